"""The memory of an engine: pages of 64 tokens, one index for a page in all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from qoqc.errors import Unsupported
from qoqc.ir.spec import KVSpec
from qoqc.quant.kv import empty_pages

PADDING_PAGE = 0
"""Belongs to no request: rows that only fill up a batch write here."""


@dataclasses.dataclass(frozen=True)
class LayerPages:
    """Keys and values of a layer; layouts in quant/kv.py.

    k_pages uint8 [pages, H, 64, Dk * bits / 8], v_pages uint8 [pages, H, Dv, 8 * bits],
    kv_words int32 [pages, H, 2, 64]
    """

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    kv_words: torch.Tensor
    bits: int

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the order the qoqc ops take them."""
        return self.k_pages, self.v_pages, self.kv_words


class Pages:
    """Pages 1 to `count` of every layer for requests, and page 0 for padding."""

    def __init__(self, specs: Sequence[KVSpec], count: int, device: torch.device) -> None:
        """Allocate them, zeroed. specs: of each layer, with its bits."""
        for spec in specs:
            if spec.bits == 4 and (spec.k_dim % 2 or spec.v_dim % 2):
                raise Unsupported(
                    f"a 4-bit cache needs even head sizes, got {spec.k_dim} and {spec.v_dim}; "
                    "use kv_bits=8"
                )
        self.count = count
        self.device = device
        self.specs = tuple(specs)
        self.layers: list[LayerPages] = []
        for spec in specs:
            shape = (spec.kv_heads, spec.k_dim, spec.v_dim, spec.bits)
            tensors = empty_pages(count + 1, *shape, device)
            self.layers.append(LayerPages(*tensors, spec.bits))

    @property
    def nbytes(self) -> int:
        """Of all layers, the padding page included."""
        return sum(x.nbytes for layer in self.layers for x in layer.tensors)


class PageBytes:
    """The pages of all layers as the rows of a byte matrix that is nowhere in one piece.

    transformers forks, offloads and restores pages through these two methods of a tensor uint8
    [pages, bytes of a page in all layers].
    """

    def __init__(self, pages: Pages) -> None:
        tensors = [x for layer in pages.layers for x in layer.tensors]
        self._parts = [x.view(x.shape[0], -1).view(torch.uint8) for x in tensors]
        self._widths = [part.shape[1] for part in self._parts]
        self.device = pages.device

    def index_select(self, dim: int, index: torch.Tensor) -> torch.Tensor:
        """The rows of pages `index` int64 [n], as one tensor [n, bytes]."""
        return torch.cat([part.index_select(dim, index) for part in self._parts], dim=1)

    def index_copy_(self, dim: int, index: torch.Tensor, rows: torch.Tensor) -> PageBytes:
        """Write `rows` uint8 [n, bytes] into the pages `index` int64 [n]."""
        parts = rows.split(self._widths, dim=1)
        for part, values in zip(self._parts, parts, strict=True):
            part.index_copy_(dim, index, values)
        return self
