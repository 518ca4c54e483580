"""Steps whose attention is in tiles that depend on nothing but a request's own tokens.

The queries of a page, positions 64 i to 64 i + 63, meet the keys of pages 0 to i, always in these
shapes; places without a query are empty. So every token's output has the same bits however its
prompt is cut into chunks, whichever prefix is shared, whoever else is in the batch, and also when a
request is put off and its tokens are run again as part of a prompt. W4A8 makes this matter: an ulp
may turn one rounding of an activation and with it a close choice of the next token.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from qoqc.ir import ops
from qoqc.ir.spec import PAGE
from qoqc.serve.pages import LayerPages, Pages
from qoqc.serve.work import Work, leading_singles

PAGES_PER_CALL = 512
"""Pages that one call reads at most: they are there in fp32, 16 MB for 8 heads of 64 channels."""


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Pages of queries, all of the same number, of several requests.

    taken  int64 [n, 64]: the token of the row at every place, or T where there is none
    table  int32 [n, i + 1]: the pages they read
    """

    taken: Tensor
    table: Tensor


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Tokens first to first + seq - 1 of the row, of each of `batch` requests, to be stored."""

    first: int
    batch: int
    seq: int
    table: Tensor
    start: Tensor

    def of(self, x: Tensor) -> Tensor:
        """These tokens of x [1, H, T, D] as [batch, H, seq, D]."""
        part: Tensor = x[0, :, self.first : self.first + self.batch * self.seq]
        heads, _, width = part.shape
        return part.reshape(heads, self.batch, self.seq, width).transpose(0, 1)


class TiledStep:
    """A step over `pages` (attention.Step)."""

    def __init__(self, pages: Pages, works: Sequence[Work], tokens: int) -> None:
        """works: of the requests in the order of the row, which is filled up to `tokens` tokens."""
        device = pages.device
        self._layers = pages.layers
        self._tokens = tokens
        self._chunks = _chunks(works, device)
        self._tiles = _tiles(works, tokens, device)
        begun = [w.blocks[i] for w in works for i in range(-(-w.start // PAGE), w.pages)]
        self._begun = torch.tensor(begun, dtype=torch.int64, device=device)

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
        pages = self._layers[layer]
        self._store(pages, k, v)
        tokens = self._tokens
        # one more token, where empty places of tiles read zeros and write what nobody reads
        row = torch.cat((q[0], q.new_zeros(q.shape[1], 1, q.shape[3])), dim=1)
        out = q.new_zeros(tokens + 1, q.shape[1], v.shape[3])
        for tiles in self._tiles:
            count, used = tiles.table.shape
            part = ops.kv4_attention(
                row[:, tiles.taken].transpose(0, 1),
                *pages.tensors,
                tiles.table,
                torch.full((count,), used * PAGE, device=q.device),
                None,
                None,
                None,
                scale,
                pages.bits,
                True,
                softcap,
                sinks,
                window,
            )
            out[tiles.taken] = part.transpose(1, 2)
        return out[None, :tokens]

    def _store(self, pages: LayerPages, k: Tensor, v: Tensor) -> None:
        # tiles read pages to their end, and 0 * NaN, left there by another request, is NaN
        pages.kv_words[self._begun] = 0
        for chunk in self._chunks:
            ops.kv4_append(
                *pages.tensors, chunk.table, chunk.start, chunk.of(k), chunk.of(v), pages.bits
            )


def _chunks(works: Sequence[Work], device: torch.device) -> list[_Chunk]:
    """The single tokens in front together, all others by request."""
    singles = leading_singles(works)
    chunks = []
    if singles:
        chunks.append(_chunk(0, 1, works[:singles], device))
    first = singles
    for work in works[singles:]:
        chunks.append(_chunk(first, work.count, [work], device))
        first += work.count
    return chunks


def _chunk(first: int, seq: int, works: Sequence[Work], device: torch.device) -> _Chunk:
    start = torch.tensor([work.start for work in works], device=device)
    return _Chunk(first, len(works), seq, _table_of(works, device), start)


def _table_of(works: Sequence[Work], device: torch.device) -> Tensor:
    """The block table int32 [requests, most pages that one of them reads], filled up with 0."""
    width = max(work.pages for work in works)
    rows = [[*work.blocks[: work.pages], *[0] * (width - work.pages)] for work in works]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _tiles(works: Sequence[Work], tokens: int, device: torch.device) -> list[_Tiles]:
    found: dict[int, list[tuple[Tensor, Sequence[int]]]] = defaultdict(list)
    first = 0
    for work in works:
        for page in range(work.start // PAGE, work.pages):
            place = torch.arange(page * PAGE, (page + 1) * PAGE)
            is_new = (place >= work.start) & (place < work.stop)
            taken = torch.where(is_new, place - work.start + first, tokens)
            found[page].append((taken, work.blocks[: page + 1]))
        first += work.count
    made = []
    for page, tiles in sorted(found.items()):
        at_once = max(1, PAGES_PER_CALL // (page + 1))
        for begin in range(0, len(tiles), at_once):
            taken_by, blocks = zip(*tiles[begin : begin + at_once], strict=True)
            table = torch.tensor(blocks, dtype=torch.int32, device=device)
            made.append(_Tiles(torch.stack(taken_by).to(device), table))
    return made
