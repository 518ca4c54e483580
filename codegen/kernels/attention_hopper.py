"""Attention of many queries over 4-bit pages on sm_90: unpacked once, then streamed by TMA.

The form of attention_prefill for plain specs on Hopper: q [B, Hq, S, D] -> out [B, Hq, S, D].
attention_unpack writes all tokens of a sequence as fp16 rows, exact ones of the chunk behind those
of the pages. Here a block takes 128 rows of one KV head, a row being a (query, head of its group)
pair: one warp fetches tiles of tokens, two warpgroups (attention_hopper_rows.py) attend to them. A
NaN in a token reaches the rows of its tile that come before it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from qoqc.codegen.family import Family, Kernel, Launch, Tile, Trial
from qoqc.codegen.kernels import attention_unpack
from qoqc.codegen.kernels.attention import Call, trial_call, unit_stride
from qoqc.codegen.kernels.attention_hopper_rows import attend, first_step, item_of
from qoqc.codegen.kernels.gemm_hopper import descriptor
from qoqc.codegen.kernels.kv_selfcheck import HOPPER_SELFCHECK
from qoqc.ir.kv_reference import kv_dequant
from qoqc.ir.spec import PAGE, AttentionSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey, sm_count

ROWS = 128
"""Rows of a block: two consumer warpgroups of 64."""

SCRATCH = 1 << 29
"""Bytes for unpacked tokens, 131,072 of 8 heads of 128 channels: longer ones take several turns."""


@gluon.jit
def fetch(
    work, rows, desc, ring, GROUP: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: tiles of tokens that some row of an item sees, from the last.

    It alone waits for the unpacking: what the others read was there before that began.
    """
    gdc_wait()
    length_ptr, length_stride, capacity, heads, seq, pairs, items = work
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = ring
    stage = 0
    phase = 1
    item = gl.program_id(0)
    step = first_step()
    while item < items:
        b, h, first_row, length, whole, used, overflow = item_of(item, work, GROUP, CAUSAL, TOKENS)
        for i in range(used):
            token = item % pairs * rows + (used - 1 - i) * TOKENS
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), TOKENS * DIM * 2)
            tma.async_copy_global_to_shared(
                desc, [token, 0], k_full.index(stage), k_buffers.index(stage)
            )
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), TOKENS * DIM * 2)
            tma.async_copy_global_to_shared(
                desc, [pairs * rows + token, 0], v_full.index(stage), v_buffers.index(stage)
            )
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        item += step
        step = 2 * gl.num_programs(0) - step


@gluon.jit(
    do_not_specialize=["length_stride", "seq", "capacity", "heads", "rows", "pairs", "items"]
)
def attention_hopper_kernel(
    q_ptr,  # [B, Hq, S, D]
    q_stride_b,
    q_stride_h,
    q_stride_s,
    desc,  # [2 * B * heads * T, D] fp16, boxes [TOKENS, D]: keys, then values
    length_ptr,  # [B] int64
    length_stride,
    out_ptr,  # [B, Hq, S, D]
    sinks_ptr,  # [Hq], read if HAS_SINKS
    scale,
    seq,
    capacity,  # tokens that a block table has room for
    heads,  # of the KV heads, those that pointers begin with
    rows,  # T
    pairs,  # B * heads
    items,  # row tiles of all pairs
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    BF16: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """A persistent block and its share of the items, see `item_of`."""
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_buffers = gl.allocate_shared_memory(gl.float16, [2, 64, DIM], layout)
    k_buffers = gl.allocate_shared_memory(gl.float16, [STAGES, TOKENS, DIM], desc.layout)
    v_buffers = gl.allocate_shared_memory(gl.float16, [STAGES, TOKENS, DIM], desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    work = (length_ptr, length_stride, capacity, heads, seq, pairs, items)
    queries = (q_ptr, q_stride_b, q_stride_h, q_stride_s)
    tiles = (k_buffers, v_buffers, k_full, k_empty, v_full, v_empty)
    ring = (q_buffers, tiles)
    # constexprs stay constexprs only where the tuples are written out
    gl.warp_specialize(
        [
            (attend, (0, work, queries, out_ptr, ring, sinks_ptr, scale, HEADS, KV_HEADS, DIM,
                      CAUSAL, HAS_SINKS, BF16, TOKENS, STAGES)),
            (attend, (1, work, queries, out_ptr, ring, sinks_ptr, scale, HEADS, KV_HEADS, DIM,
                      CAUSAL, HAS_SINKS, BF16, TOKENS, STAGES)),
            (fetch, (work, rows, desc, tiles, HEADS // KV_HEADS, DIM, CAUSAL, TOKENS, STAGES)),
        ],
        [4, 1], [REGISTERS, 24],
    )  # fmt: skip


def launch(unpack: Kernel, attend: Kernel, call: Call) -> torch.Tensor:
    """kv4_attention in two launches, see Call: out [B, Hq, S, D] in q's dtype.

    More where the unpacked tokens of all heads would take more than SCRATCH: a part after another,
    of some sequences, or of some heads of one.
    """
    out = call.empty_out()
    batch, kv_heads = call.q.shape[0], call.k_pages.shape[1]
    fit = SCRATCH // (2 * attention_unpack.rows_of(call) * call.v_pages.shape[2] * 2)
    if not out.numel():
        return out
    if batch * kv_heads <= fit:
        start(attend, call, out, attention_unpack.launch(unpack, call, kv_heads))
        return out
    sequences, heads = max(1, fit // kv_heads), min(max(1, fit), kv_heads)
    for first, head in itertools.product(range(0, batch, sequences), range(0, kv_heads, heads)):
        count = min(heads, kv_heads - head)
        part, to = _part(call, out, slice(first, first + sequences), head, count)
        start(attend, part, to, attention_unpack.launch(unpack, part, count))
    return out


def _part(
    call: Call, out: torch.Tensor, batch: slice, head: int, heads: int
) -> tuple[Call, torch.Tensor]:
    """The call of some sequences and KV heads, and their part of `out`.

    Pages are those of all heads: addresses begin at `head`.
    """
    group = call.group
    query = slice(head * group, (head + heads) * group)

    def chunk(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[batch, head : head + heads]

    part = dataclasses.replace(
        call, q=call.q[batch, query], k_pages=call.k_pages[:, head:],
        v_pages=call.v_pages[:, head:], kv_words=call.kv_words[:, head:],
        block_table=call.block_table[batch], length=call.length[batch],
        k_chunk=chunk(call.k_chunk), v_chunk=chunk(call.v_chunk),
        sinks=None if call.sinks is None else call.sinks[query],
    )  # fmt: skip
    return part, out[batch, query]


def start(kernel: Launch, call: Call, out: torch.Tensor, tokens: torch.Tensor) -> None:
    """Launch on checked tensors, see Call; `out` [B, Hq, S, D] in q's dtype has elements.

    tokens  [2, B, heads, T, D] as attention_unpack gives them, for the first `heads` KV heads
    """
    tile, (_, batch, heads, rows, dim) = kernel.tile, tokens.shape
    q, pairs, seq = unit_stride(call.q), batch * heads, call.q.shape[2]
    # not call.group: of a part, pages have more heads than queries
    items = pairs * ceil_div(seq * (q.shape[1] // heads), ROWS)
    kernel(
        (min(items, sm_count(q.device)),), q, *q.stride()[:3],
        descriptor(tokens, (tokens.numel() // dim, dim), (tile["TOKENS"], dim)),
        call.length, call.length.stride(0), out, out if call.sinks is None else call.sinks,
        call.scale, seq, call.block_table.shape[1] * PAGE, heads, rows, pairs, items,
    )  # fmt: skip


def bind(spec: AttentionSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `attention_hopper_kernel`."""
    return {
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv.kv_heads,
        "DIM": spec.kv.k_dim,
        "CAUSAL": spec.causal,
        "HAS_SINKS": spec.has_sinks,
        "BF16": spec.dtype is torch.bfloat16,
        **dict(tile.constexprs),
    }


def shared_bytes(spec: AttentionSpec, tile: Tile) -> int:
    """A block's queries, ring of tiles and barriers, and what Triton hands the partitions."""
    ring = tile["STAGES"] * (2 * tile["TOKENS"] * spec.kv.k_dim * 2 + 32)
    return ROWS * spec.kv.k_dim * 2 + ring + 1536


def _tile(tokens: int, stages: int) -> Tile:
    values = (("TOKENS", tokens), ("STAGES", stages), ("REGISTERS", 240))
    return Tile(values, num_warps=4, num_stages=1)


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> Tile:
    """As many tokens at once as registers hold scores for: fewer waits for each of them."""
    return _tile(128, 2)


def candidates(spec: AttentionSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Tokens of a tile and stages."""
    return (_tile(128, 2), _tile(64, 4))


def trial(spec: AttentionSpec, size: int, device: torch.device) -> Trial:
    """Attend with `size` queries to themselves and 1024 tokens before them, unpacked already."""
    call = trial_call(spec, 1, size, 1024, device)
    chunk = (call.k_chunk, call.v_chunk)
    pages = (call.k_pages, call.v_pages, call.kv_words, call.block_table, call.length)
    unpacked = torch.stack(kv_dequant(*pages, *chunk, 4, torch.float16))
    rest = attention_unpack.rows_of(call) - unpacked.shape[3]
    tokens = torch.nn.functional.pad(unpacked, (0, 0, 0, rest))

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        out = call.empty_out()
        start(kernel, call, out, tokens)
        return (out,)

    return run


ATTENTION_HOPPER = Family(
    "attention_hopper",
    attention_hopper_kernel,
    bind,
    heuristic,
    candidates,
    HOPPER_SELFCHECK,
    trial,
    shared_bytes,
    tolerance=1e-2,
    fp_fusion=True,
    refuses=attention_unpack.refuses,
    pdl=True,
)
