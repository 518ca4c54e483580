"""Steps of the GPU: all requests with one new token in one call, prompts one after the other.

A call's work is divided evenly among the SMs, so the order of a token's sums depends on who else is
in the batch: what a request generates may differ in near ties from what it generates alone. The
linears add integers and do not differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qoqc.codegen.kernels.attention_forms import faster_than_flash
from qoqc.ir import ops
from qoqc.ir.spec import AttentionSpec, KVSpec
from qoqc.runtime.device import device_key
from qoqc.serve.pages import PADDING_PAGE, LayerPages, Pages
from qoqc.serve.work import Work, leading_singles

FLASH_WIDTH = 256
"""Channels of a head up to which torch's flash attention goes."""


class Rows:
    """Block tables and lengths of up to `most` single tokens, at addresses that stay.

    table    int32 [most, pages]
    lengths  int64 [layers, most]: a layer's step counts its own up
    """

    def __init__(self, most: int, pages: int, layers: int, device: torch.device) -> None:
        self.most = most
        pinned = device.type == "cuda"
        self.table = torch.full((most, pages), PADDING_PAGE, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(layers, most, dtype=torch.int64, device=device)
        self._host_table = torch.zeros(most, pages, dtype=torch.int32, pin_memory=pinned)
        self._host_lengths = torch.zeros(most, dtype=torch.int64, pin_memory=pinned)
        self._table_rows = self._host_table.numpy()
        self._length_row = self._host_lengths.numpy()

    def fill(self, works: Sequence[Work], rows: int) -> None:
        """Set the first `rows` rows to those of `works`, and of the rest to the padding page."""
        width = max((work.pages for work in works), default=1)
        for row, work in enumerate(works):
            self._table_rows[row, : work.pages] = work.blocks[: work.pages]
            self._length_row[row] = work.start
        self._table_rows[len(works) : rows, 0] = PADDING_PAGE
        self._length_row[len(works) : rows] = 0
        # what stands behind a sequence's own pages is never read
        self.table[:rows, :width].copy_(self._host_table[:rows, :width], non_blocking=True)
        lengths = self._host_lengths[:rows].to(self.lengths.device, non_blocking=True)
        self.lengths[:, :rows].copy_(lengths)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """Tokens first to first + count - 1 of the row: a chunk of one request's prompt.

    start, stop int64 [1]: its tokens before and after the step; table int32 [1, pages]
    """

    first: int
    count: int
    begins: bool
    start: Tensor
    stop: Tensor
    table: Tensor

    def of(self, x: Tensor) -> Tensor:
        """These tokens of x [1, H, T, D]."""
        return x[:, :, self.first : self.first + self.count]


class RaggedStep:
    """A step over `pages` (attention.Step).

    CUDA graphs: steps of the same number of rows and no prompts launch the same kernels on the
    same addresses, those of `rows`.
    """

    def __init__(self, pages: Pages, rows: Rows, works: Sequence[Work], tokens: int) -> None:
        """works: of the requests in the order of the row.

        If all of them have one token, the row is filled up to `tokens` of them.
        """
        self._pages = pages
        singles = leading_singles(works)
        self._count = min(tokens, rows.most) if singles == len(works) else singles
        self._rows = rows
        rows.fill(works[:singles], self._count)
        self._prompts: list[_Prompt] = []
        first = singles
        for work in works[singles:]:
            self._prompts.append(_prompt(work, first, pages.device))
            first += work.count

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
        sinks: Tensor | None,
    ) -> Tensor:
        """As attention.Step says."""
        pages, count = self._pages.layers[layer], self._count
        out = q.new_zeros(q.shape[2], q.shape[1], v.shape[3])
        if count:
            out[:count] = self._singles(layer, q, k, v, scale, softcap, window, sinks)
        kv = self._pages.specs[layer]
        is_plain = not (softcap or window) and sinks is None
        rounded = None
        begins = any(prompt.begins for prompt in self._prompts)
        if is_plain and begins and _flash_takes(q, v) and not _pages_win(kv, q):
            rounded = ops.kv4_round(k, pages.bits), ops.kv4_round(v, pages.bits)
        for prompt in self._prompts:
            own = prompt.of(q)
            new = prompt.of(k), prompt.of(v)
            ops.kv4_append(*pages.tensors, prompt.table, prompt.start, *new, pages.bits)
            if rounded is not None and prompt.begins:
                part = _attend_flash(own, prompt.of(rounded[0]), prompt.of(rounded[1]), scale)
            else:
                part = _attend_pages(pages, prompt, own, scale, softcap, window, sinks)
            out[prompt.first : prompt.first + prompt.count] = part[0].transpose(0, 1)
        return out[None]

    def _singles(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        softcap: float,
        window: int,
        sinks: Tensor | None,
    ) -> Tensor:
        """The output [rows, Hq, Dv] of the tokens in front, each the last of its request."""
        pages, count = self._pages.layers[layer], self._count
        table, lengths = self._rows.table[:count], self._rows.lengths[layer, :count]
        one = [x[0, :, :count].transpose(0, 1).unsqueeze(2) for x in (q, k, v)]
        # queries and keys are turned already
        grid = ("none", 0.0, 0.0, True)
        out: Tensor = ops.kv4_decode(
            *one, None, None, None, None, *pages.tensors, table, lengths, None, sinks, *grid,
            scale, softcap, pages.bits, window,
        )  # fmt: skip
        return out[:, :, 0]


def _prompt(work: Work, first: int, device: torch.device) -> _Prompt:
    ends = torch.tensor([work.start, work.stop], device=device)
    table = torch.tensor([list(work.blocks[: work.pages])], dtype=torch.int32, device=device)
    return _Prompt(first, work.count, work.start == 0, ends[:1], ends[1:], table)


def _attend_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A prompt's first chunk among itself, q [1, Hq, S, Dk]: [1, Hq, S, Dv].

    k and v as the pages have them, so that where chunks end makes a difference in rounding only.
    """
    # one that plans for every length anew (cuDNN) would plan for every prompt
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def _attend_pages(
    pages: LayerPages,
    prompt: _Prompt,
    q: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
) -> Tensor:
    """A chunk from q [1, Hq, S, Dk] over all of its request's tokens: [1, Hq, S, Dv]."""
    out: Tensor = ops.kv4_attention(
        q, *pages.tensors, prompt.table, prompt.stop, None, None, None, scale, pages.bits, True,
        softcap, sinks, window,
    )  # fmt: skip
    return out


def _flash_takes(q: Tensor, v: Tensor) -> bool:
    same = q.shape[-1] == v.shape[-1] <= FLASH_WIDTH
    return q.is_cuda and same and q.dtype in (torch.bfloat16, torch.float16)


def _pages_win(kv: KVSpec, q: Tensor) -> bool:
    """Whether a prompt takes less time read from its pages than rounded, then by flash attention.

    Either way it attends to what the pages give back.
    """
    spec = AttentionSpec(q.shape[1], kv, q.dtype, causal=True)
    return faster_than_flash(spec, device_key(q.device))
