"""Prompts of several sequences packed into one row: one op from projections to attention.

`packed_prefill` is for engines of one's own: what kv4_rotate_append and kv4_attention (ir/ops.py)
do for a batch of equal lengths, it does for any lengths, each sequence with a history of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qoqc.ir import ops

torch.library.define(
    "qoqc::kv4_packed_prefill",
    "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
    "Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!) kv_words, Tensor block_table, "
    "Tensor start, Tensor cu_seqlens, str form, float eps, float offset, bool round_first, "
    "float scale, float softcap, Tensor? sinks, int bits, int window=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
packed_prefill = torch.ops.qoqc.kv4_packed_prefill.default


@dataclasses.dataclass(frozen=True)
class _Run:
    """Sequences first to first + batch - 1, which have `seq` tokens each, from `token` on."""

    first: int
    batch: int
    token: int
    seq: int

    def of(self, x: Tensor) -> Tensor:
        """Their part of a row [1, H, T, D] as [batch, H, seq, D]; shares its storage."""
        part: Tensor = x[0].narrow(1, self.token, self.batch * self.seq)
        heads, _, width = part.shape
        return part.view(heads, self.batch, self.seq, width).transpose(0, 1)

    def angles(self, x: Tensor | None) -> Tensor | None:
        """Their part of angles [1, T, R] as [batch, seq, R]."""
        if x is None:
            return None
        part: Tensor = x[0].narrow(0, self.token, self.batch * self.seq)
        return part.view(self.batch, self.seq, x.shape[2])

    def rows(self, x: Tensor) -> Tensor:
        """Their rows of a tensor with one for each sequence."""
        return x.narrow(0, self.first, self.batch)


@torch.library.impl("qoqc::kv4_packed_prefill", "default")
def _packed_prefill_impl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_words: Tensor,
    block_table: Tensor,
    start: Tensor,
    cu_seqlens: Tensor,
    form: str,
    eps: float,
    offset: float,
    round_first: bool,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    bits: int,
    window: int = 0,
) -> Tensor:
    """q [1, Hq, T, Dk], k [1, H, T, Dk], v [1, H, T, Dv] -> out [1, Hq, T, Dv].

    Sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1 of the row (integers [B + 1],
    from 0 to T, on the host: reading them from a device waits for it), behind start[b] (int64 [B])
    cached ones, in the pages of row b of block_table (int32 [B, P]); cos and sin [1, T, R] belong
    to the row's tokens. A token sees its sequence's cached tokens as the cache gives them back,
    and of the row those up to itself as they are. The rest is as in kv4_rotate_append and
    kv4_attention. Sequences of equal length that are neighbours run at once. Raises ValueError
    where cu_seqlens does not divide the row.
    """
    offsets: list[int] = cu_seqlens.tolist()
    _check(offsets, q, block_table, start)
    out = q.new_empty((1, *q.shape[1:3], v.shape[3]))
    pages = (k_pages, v_pages, kv_words)
    for run in _runs(offsets):
        table, before = run.rows(block_table), run.rows(start)
        values = run.of(v)
        queries, keys = ops.kv4_rotate_append(
            run.of(q), run.of(k), values, q_weight, k_weight, run.angles(cos), run.angles(sin),
            *pages, table, before, form, eps, offset, round_first, bits,
        )  # fmt: skip
        part = ops.kv4_attention(
            queries, *pages, table, before + run.seq, None, keys, values, scale, bits, True,
            softcap, sinks, window,
        )  # fmt: skip
        run.of(out).copy_(part)
    return out


@torch.library.register_fake("qoqc::kv4_packed_prefill")  # type: ignore[untyped-decorator]
def _packed_prefill_fake(q: Tensor, k: Tensor, v: Tensor, *args: object) -> Tensor:
    return q.new_empty((1, *q.shape[1:3], v.shape[3]))


def _runs(offsets: Sequence[int]) -> Iterator[_Run]:
    """Neighbours of equal length together; sequences without tokens are left out."""
    lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    first = 0
    for seq, group in itertools.groupby(lengths):
        batch = len(list(group))
        if seq:
            yield _Run(first, batch, offsets[first], seq)
        first += batch


def _check(offsets: Sequence[int], q: Tensor, block_table: Tensor, start: Tensor) -> None:
    tokens, sequences = q.shape[2], len(offsets) - 1
    rising = all(begin <= end for begin, end in itertools.pairwise(offsets))
    if not offsets or offsets[0] != 0 or offsets[-1] != tokens or not rising or q.shape[0] != 1:
        raise ValueError(
            f"kv4_packed_prefill: cu_seqlens {list(offsets)} does not divide the tokens of q "
            f"{tuple(q.shape)}: it must rise from 0 to {tokens}, for a row [1, H, T, D]"
        )
    if block_table.shape[0] != sequences or tuple(start.shape) != (sequences,):
        raise ValueError(
            f"kv4_packed_prefill: cu_seqlens has {sequences} sequences, block_table "
            f"{tuple(block_table.shape)} and start {tuple(start.shape)} have another number"
        )
