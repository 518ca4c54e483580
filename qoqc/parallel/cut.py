"""The part of a linear that a rank holds, in 16 bit and packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from qoqc.ir.spec import GROUP, TILE_N
from qoqc.quant.pack import ceil_div
from qoqc.quant.weight import PackedWeight, rows

Index = tuple[slice, ...]
Read = Callable[[str, Index], torch.Tensor]
"""read(field, index): a part of a stored tensor of a packed weight; an empty index is all of it."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Channels start:stop of a weight [N, K]: output channels ("rows") or input channels.

    whole_outside  rows: the outputs of all ranks are put together behind the linear
                   columns: the input comes whole and is cut in front of it
    first          whether this rank adds the bias of a sum (columns)
    exact          columns: the input is quantized by the largest value on any rank, which comes
                   as a channel of its own, see `padding`
    """

    axis: Literal["rows", "columns"]
    start: int
    stop: int
    whole_outside: bool = False
    first: bool = True
    exact: bool = False

    @property
    def width(self) -> int:
        """How many channels the part has."""
        return self.stop - self.start

    @property
    def padding(self) -> int:
        """Channels of weight 0 behind those of the part: what fills a group, and a whole group.

        The first channel of the latter carries the largest |x| of all ranks, so that every rank
        quantizes by the scale that one rank would have, and sums the very same integers.
        """
        return -self.width % GROUP + GROUP if self.exact else 0

    @property
    def index(self) -> Index:
        """The part as an index of a weight [N, K]."""
        part = slice(self.start, self.stop)
        return (part,) if self.axis == "rows" else (slice(None), part)

    def shape(self, n: int, k: int) -> tuple[int, int]:
        """The part's shape, of a weight [n, k], with its padding."""
        return (self.width, k) if self.axis == "rows" else (n, self.width + self.padding)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of `weight` [N, K], padded, with memory of its own."""
        part = weight[self.index].clone(memory_format=torch.contiguous_format)
        return F.pad(part, (0, self.padding))

    def of_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """The part of `bias` [N]; of a sum's bias all on the first rank, zeros on the others.

        Zeros and not none: so the ranks have the same graph, and no two of them can come to run
        its sums in different order.
        """
        if self.axis == "rows":
            return bias[self.start : self.stop].clone()
        return bias.clone() if self.first else torch.zeros_like(bias)


def part(read: Read, n: int, k: int, grouped: bool, cut: Cut) -> PackedWeight:
    """The part `cut` of a packed weight [n, k], of which `read` reads no more than that.

    grouped  format g128, else per channel

    Exact: rows are independent of each other, and so are groups of 128 input channels. Columns
    begin at a multiple of 128, which the plan sees to.
    """
    grid = "group_word" if grouped else "channel_zero"
    if cut.axis == "columns":
        assert cut.start % GROUP == 0, "parts begin at whole groups"
        groups = slice(cut.start // GROUP, ceil_div(cut.stop, GROUP))
        found = {
            "qweight": read("qweight", (slice(None), groups)),
            "channel_scale": read("channel_scale", ()),
            grid: read(grid, (groups,) if grouped else ()),
        }
        packed = _packed(found, n, cut.width)
        return with_empty_group(packed) if cut.exact else packed
    # whole tiles of rows first, then the rows of them
    tiles = slice(cut.start // TILE_N, ceil_div(cut.stop, TILE_N))
    cover = slice(tiles.start * TILE_N, min(tiles.stop * TILE_N, n))
    found = {
        "qweight": read("qweight", (tiles,)),
        "channel_scale": read("channel_scale", (cover,)),
        grid: read(grid, (slice(None), cover) if grouped else (cover,)),
    }
    whole = _packed(found, cover.stop - cover.start, k)
    return rows(whole, cut.start - cover.start, cut.stop - cover.start)


def with_empty_group(packed: PackedWeight) -> PackedWeight:
    """The packed weight with 128 more input channels, behind the last whole group, of weight 0."""
    tiles, groups = packed.qweight.shape[:2]
    more = packed.qweight.new_zeros(tiles, 1, TILE_N, GROUP // 2)
    word, zero = packed.group_word, packed.channel_zero
    if word is not None:  # codes 0 at scale 1 and zero 0: see quant/weight.py
        word = torch.cat([word, torch.full_like(word[:1], 1 | 128 << 8)])
    if zero is not None:
        nibbles = F.pad(zero | zero << 4, (0, tiles * TILE_N - packed.out_features))
        more += nibbles.to(torch.uint8).view(tiles, 1, TILE_N, 1)
    qweight = torch.cat([packed.qweight, more], dim=1)
    k = (groups + 1) * GROUP
    return PackedWeight(qweight, packed.channel_scale, word, zero, packed.out_features, k)


def _packed(found: dict[str, torch.Tensor], n: int, k: int) -> PackedWeight:
    own = {name: tensor.contiguous() for name, tensor in found.items()}
    return PackedWeight(
        own["qweight"], own["channel_scale"], own.get("group_word"), own.get("channel_zero"), n, k
    )
