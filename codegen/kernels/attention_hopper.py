"""Attention of many queries over 4-bit pages on sm_90: a warpgroup unpacks, two attend.

The form of attention_prefill for plain specs on Hopper: q [B, Hq, S, D] -> out [B, Hq, S, D]. A
block takes 128 rows of one KV head, a row being a (query, head of its group) pair. Its producer
(attention_hopper_pages.py) unpacks a page once for all of them, to fp16; the chunk's exact tokens
become fp16, too, larger ones than it holds its largest. Its consumers are in
attention_hopper_rows.py. A NaN in a token reaches the rows of its tile that come before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import Call, trial_call, unit_stride
from qoqc.codegen.kernels.attention_hopper_pages import unpack
from qoqc.codegen.kernels.attention_hopper_rows import attend
from qoqc.codegen.kernels.kv_selfcheck import HOPPER_SELFCHECK
from qoqc.ir.spec import PAGE, AttentionSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

ROWS = 128
"""Rows of a block: two consumer warpgroups of 64."""


@gluon.jit(do_not_specialize=["table_stride", "length_stride", "seq", "pages", "scale"])
def attention_hopper_kernel(
    q_ptr,  # [B, Hq, S, D]
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_pages_ptr,  # [pages, H, 64, D / 8] int32
    v_pages_ptr,  # [pages, H, D, 8] int32
    words_ptr,  # [pages, H, 2, 64] int32
    table_ptr,  # [B, P] int32
    table_stride,
    length_ptr,  # [B] int64
    length_stride,
    k_chunk_ptr,  # [B, H, S, D / 2] int32, read if HAS_CHUNK; strides in int32, too
    k_chunk_stride_b,
    k_chunk_stride_h,
    k_chunk_stride_s,
    v_chunk_ptr,
    v_chunk_stride_b,
    v_chunk_stride_h,
    v_chunk_stride_s,
    out_ptr,  # [B, Hq, S, D]
    sinks_ptr,  # [Hq], read if HAS_SINKS
    scale,
    seq,
    pages,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    DIM: gl.constexpr,
    HAS_CHUNK: gl.constexpr,
    CAUSAL: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    BF16: gl.constexpr,
    STAGES: gl.constexpr,
    UNPACK_REGISTERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """Row tile `program_id(0)`, from the last, of KV head `program_id(1)` of one sequence."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    k_layout: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    k_buffers = gl.allocate_shared_memory(gl.float16, [STAGES, 64, DIM], k_layout)
    v_buffers = gl.allocate_shared_memory(gl.float16, [STAGES, DIM, 64], k_layout)
    ones = gl.allocate_shared_memory(gl.float16, [8, 64], k_layout)
    ones.store(gl.full([8, 64], 1.0, gl.float16, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
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

    b = gl.program_id(2).to(gl.int64)
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    true_length = gl.load(length_ptr + b * length_stride)
    # a longer sequence has no table entries to read: it gives NaN
    overflow = true_length > pages.to(gl.int64) * 64
    length = gl.where(overflow, 0, gl.maximum(true_length, 0)).to(gl.int32)
    # no row of the block sees a token from `end` on; all see those before `begin`
    end = length
    begin = length
    if CAUSAL:
        end = gl.minimum(length, gl.maximum(length - seq + (tile * 128 + 127) // GROUP + 1, 0))
        begin = gl.minimum(length, gl.maximum(length - seq + tile * 128 // GROUP + 1, 0))
    cached = length
    tiles = 0
    if HAS_CHUNK:
        cached = gl.maximum(length - seq, 0)
        tiles = (gl.maximum(end - (length - seq), 0) + 63) // 64
        # of a sequence that is nothing but part of the chunk, nothing is seen without a length
        tiles = gl.where(length > 0, tiles, 0)
    used = (gl.minimum(cached, end) + 63) // 64
    whole = gl.minimum(cached, begin) // 64
    h = gl.program_id(1).to(gl.int64)
    extent = (length, cached, used, whole, tiles)
    queries = (q_ptr + b * q_stride_b, q_stride_h, q_stride_s)
    output = (out_ptr + b * HEADS * seq * DIM, overflow)
    cache = (k_pages_ptr, v_pages_ptr, words_ptr, table_ptr + b * table_stride)
    chunk = (
        k_chunk_ptr + b * k_chunk_stride_b + h * k_chunk_stride_h, k_chunk_stride_s,
        v_chunk_ptr + b * v_chunk_stride_b + h * v_chunk_stride_h, v_chunk_stride_s, seq,
    )  # fmt: skip
    ring = (k_buffers, v_buffers, ones, k_full, k_empty, v_full, v_empty)
    # constexprs stay constexprs only where the tuples are written out
    gl.warp_specialize(
        [
            (attend, (0, extent, queries, output, ring, sinks_ptr, scale, seq, HEADS, KV_HEADS,
                      DIM, HAS_CHUNK, CAUSAL, HAS_SINKS, BF16, STAGES)),
            (attend, (1, extent, queries, output, ring, sinks_ptr, scale, seq, HEADS, KV_HEADS,
                      DIM, HAS_CHUNK, CAUSAL, HAS_SINKS, BF16, STAGES)),
            (unpack, (extent, cache, chunk, ring, DIM, KV_HEADS, HAS_CHUNK, not BF16, STAGES)),
        ],
        [4, 4], [REGISTERS, UNPACK_REGISTERS],
    )  # fmt: skip


def start(kernel: Launch, call: Call, out: torch.Tensor) -> None:
    """Launch on checked tensors, see Call; `out` [B, Hq, S, D] in q's dtype has elements."""
    batch, kv_heads, seq = call.q.shape[0], call.k_pages.shape[1], call.q.shape[2]
    q = unit_stride(call.q)
    chunk: list[Any] = []
    for x in (call.k_chunk, call.v_chunk):
        # any tensor stands in for one that is not read
        paired = call.kv_words if x is None else _paired(x)
        chunk += [paired, *paired.stride()[:3]]
    kernel(
        (ceil_div(call.rows, ROWS), kv_heads, batch), q, *q.stride()[:3],
        call.k_pages.view(torch.int32), call.v_pages.view(torch.int32), call.kv_words,
        call.block_table, call.block_table.stride(0), call.length, call.length.stride(0),
        *chunk, out, out if call.sinks is None else call.sinks, call.scale, seq,
        call.block_table.shape[1],
    )  # fmt: skip


def _paired(x: torch.Tensor) -> torch.Tensor:
    """16-bit numbers [..., D] as int32 [..., D / 2], copied unless they lie so already."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return (x if x.stride(-1) == 1 and aligned else x.contiguous()).view(torch.int32)


def refuses(spec: AttentionSpec, device: DeviceKey) -> str | None:
    """Why this form does not take a spec, or None."""
    if device.arch != 90:
        return f"{device.name} is not of compute capability 9.0"
    kv = spec.kv
    if kv.bits != 4 or kv.k_dim != kv.v_dim or kv.k_dim not in (64, 128):
        return f"heads of {kv.k_dim} and {kv.v_dim} channels in {kv.bits} bits"
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return f"queries of {spec.dtype}"
    if spec.has_mask or spec.has_softcap:
        return "a mask or a soft cap"
    if spec.has_window:
        return "a window"
    return None


def bind(spec: AttentionSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `attention_hopper_kernel`."""
    return {
        "HEADS": spec.heads,
        "KV_HEADS": spec.kv.kv_heads,
        "DIM": spec.kv.k_dim,
        "HAS_CHUNK": spec.has_chunk,
        "CAUSAL": spec.causal,
        "HAS_SINKS": spec.has_sinks,
        "BF16": spec.dtype is torch.bfloat16,
        **dict(tile.constexprs),
    }


def shared_bytes(spec: AttentionSpec, tile: Tile) -> int:
    """A block's ring of tiles and its barriers, the ones, and what Triton hands the partitions."""
    return tile["STAGES"] * (2 * PAGE * spec.kv.k_dim * 2 + 32) + 8 * PAGE * 2 + 512


def _tile(stages: int, registers: tuple[int, int]) -> Tile:
    values = (
        ("STAGES", stages), ("UNPACK_REGISTERS", registers[0]), ("REGISTERS", registers[1])
    )  # fmt: skip
    return Tile(values, num_warps=4, num_stages=1)


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> Tile:
    """Four stages; the 504 registers of three threads, as much as the producer needs for it."""
    return _tile(4, (112, 192))


def candidates(spec: AttentionSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Stages."""
    return tuple(_tile(stages, (112, 192)) for stages in (4, 3, 2))


def trial(spec: AttentionSpec, size: int, device: torch.device) -> Trial:
    """Attend with `size` queries to themselves and 1024 tokens before them."""
    call = trial_call(spec, 1, size, 1024, device)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        out = call.empty_out()
        start(kernel, call, out)
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
    start=start,
    refuses=refuses,
)
