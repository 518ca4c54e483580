"""Attention of a few queries per sequence over the pages of the KV cache, split along the cache.

q [B, Hq, S, Dk] -> partial results per (row, split), which attention_combine.py adds up. The rows
of a KV head are its S * group (query, head) pairs, up to BLOCK_R of them in one program. Twin:
ir/kv_reference.py kv_attention.

The tile of a dot product is [tokens, channels] x [channels, rows]: codes unpack straight into the
registers of the left operand, and eight rows fill the right one where 16 would be padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import Call, constexprs, has_ptx, lanes, trial_call
from qoqc.codegen.kernels.kv_selfcheck import DECODE_SELFCHECK
from qoqc.codegen.kernels.pieces_kv import (
    HEADROOM,
    SMALLEST_SCALE,
    greatest_scale,
    load_codes,
    look,
    mma,
    rise,
    split_weights,
    split_word,
    weigh,
)
from qoqc.ir.spec import PAGE, AttentionSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey, device_key

CTAS_PER_SM = 12
"""Programs of one warp that an SM of sm_90 holds at 168 registers (kernel notes, H200)."""

MAX_ROWS = 64
"""Rows per KV head up to which this kernel is meant; attention_prefill.py takes over from there."""

MAX_SPLITS = 64
"""What the combine kernel adds up per row; more parts than that are shorter than two pages."""


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "length_stride",
        "mask_stride_b",
        "mask_stride_h",
        "mask_stride_s",
        "mask_len",
        "seq",
        "pages",
        "splits",
        "window",
    ]
)
def attention_decode(
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_pages_ptr,
    v_pages_ptr,
    words_ptr,
    table_ptr,
    table_stride,
    length_ptr,
    length_stride,
    mask_ptr,
    mask_stride_b,
    mask_stride_h,
    mask_stride_s,
    mask_len,
    k_chunk_ptr,
    k_chunk_stride_b,
    k_chunk_stride_h,
    k_chunk_stride_s,
    v_chunk_ptr,
    v_chunk_stride_b,
    v_chunk_stride_h,
    v_chunk_stride_s,
    part_ptr,
    stat_ptr,
    scale,
    seq,
    pages,
    splits,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OPERAND: tl.constexpr,
    WEIGHT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Split `program_id(1)` of the pages of one (sequence, KV head), for BLOCK_R rows.

    Writes the unnormalised sums part fp32 [B, Hq, S, splits, Dv] and stat fp32 [.., splits, 2]:
    peak (log2) and total. A split that saw nothing has total 0 and leaves its part unwritten.
    """
    HALF: tl.constexpr = 32
    GROUP: tl.constexpr = HEADS // KV_HEADS
    K_HALF: tl.constexpr = K_DIM // 2
    K_BYTES: tl.constexpr = K_DIM * BITS // 8
    V_BYTES: tl.constexpr = 8 * BITS
    CENTRE: tl.constexpr = 8.0 if BITS == 4 else 128.0
    b = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    h = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    length = tl.load(length_ptr + b * length_stride)
    # a longer sequence has no table entries to read: the combine kernel answers NaN for it
    length = tl.where(length <= pages * (2 * HALF), tl.maximum(length, 0), 0).to(tl.int32)

    row = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    query = row // GROUP
    head = h * GROUP + row % GROUP
    in_row = query < seq
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_V)
    j = tl.arange(0, HALF)
    in_q = (c < K_HALF)[:, None] & in_row[None, :]
    wide_head = head.to(tl.int64)
    q_rows = q_ptr + b * q_stride_b + (wide_head * q_stride_h + query * q_stride_s)[None, :]
    q0 = tl.load(q_rows + c[:, None], mask=in_q, other=0.0)  # [BLOCK_C, BLOCK_R]
    q1 = tl.load(q_rows + K_HALF + c[:, None], mask=in_q, other=0.0)
    q_sum = tl.sum(q0.to(tl.float32), 0) + tl.sum(q1.to(tl.float32), 0)
    q0 = q0.to(OPERAND)
    q1 = q1.to(OPERAND)
    log2_scale = scale * 1.4426950408889634
    position = length - seq + query
    mask_rows = mask_ptr + b * mask_stride_b
    mask_rows += (wide_head * mask_stride_h + query.to(tl.int64) * mask_stride_s)[None, :]
    cached = tl.maximum(length - seq, 0) if HAS_CHUNK else length

    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    offset = tl.zeros((BLOCK_R,), tl.float32)  # sum of p * middle
    acc = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)  # sum of p * value scale * gain * codes
    top = SMALLEST_SCALE

    used = (cached + 2 * HALF - 1) // (2 * HALF)
    skipped = 0
    if HAS_WINDOW:
        # pages before all that the first query of the sequence sees
        skipped = tl.minimum(tl.maximum(length - seq + 1 - window, 0) // (2 * HALF), used)
    per_split = (used - skipped + splits - 1) // splits
    first = skipped + split * per_split
    for i in range(first, tl.minimum(used, first + per_split)):
        page = tl.load(table_ptr + b * table_stride + i).to(tl.int64) * KV_HEADS + h
        t0 = i * (2 * HALF) + j
        t1 = t0 + HALF
        seen0 = look(  # [HALF, BLOCK_R]
            t0, cached, in_row, position, mask_rows, mask_len, window,
            0, CAUSAL, HAS_MASK, HAS_WINDOW,
        )  # fmt: skip
        seen1 = look(
            t1, cached, in_row, position, mask_rows, mask_len, window,
            0, CAUSAL, HAS_MASK, HAS_WINDOW,
        )  # fmt: skip
        in_k = (c < K_HALF)[None, :]
        in_v = (d < V_DIM)[:, None]
        # words past the end are stale; read as zeros they cannot spread a NaN
        live0 = t0 < cached
        live1 = t1 < cached
        if HAS_MASK:
            # nothing of a page that no row sees is loaded; a branch would end the pipelining
            any_seen = tl.max(tl.max((seen0 | seen1).to(tl.int32), 0), 0) != 0
            live0 = live0 & any_seen
            live1 = live1 & any_seen
            in_k = in_k & any_seen
            in_v = in_v & any_seen
        words = words_ptr + page * (4 * HALF) + j
        k_scale0, k_middle0 = split_word(tl.load(words, mask=live0, other=0), CENTRE)
        k_scale1, k_middle1 = split_word(tl.load(words + HALF, mask=live1, other=0), CENTRE)
        v_scale0, v_middle0 = split_word(tl.load(words + 2 * HALF, mask=live0, other=0), CENTRE)
        v_scale1, v_middle1 = split_word(tl.load(words + 3 * HALF, mask=live1, other=0), CENTRE)

        k_page = k_pages_ptr + page * (2 * HALF * K_BYTES)
        k_tile = j[:, None] * K_BYTES + c[None, :]  # [HALF, BLOCK_C] bytes
        k00, k01 = load_codes(k_page, k_tile, K_HALF, in_k, BITS, OPERAND, PTX)
        k_page += HALF * K_BYTES
        k10, k11 = load_codes(k_page, k_tile, K_HALF, in_k, BITS, OPERAND, PTX)
        none = tl.zeros((HALF, BLOCK_R), tl.float32)
        s0 = mma(k01, q1, mma(k00, q0, none))
        s1 = mma(k11, q1, mma(k10, q0, none))
        s0 = (s0 * k_scale0[:, None] + q_sum[None, :] * k_middle0[:, None]) * log2_scale
        s1 = (s1 * k_scale1[:, None] + q_sum[None, :] * k_middle1[:, None]) * log2_scale
        s0 = tl.where(seen0, s0, float("-inf"))
        s1 = tl.where(seen1, s1, float("-inf"))

        peak, total, shrink, p0, p1 = rise(peak, total, s0, s1, 0)
        offset *= shrink
        offset += tl.sum(weigh(p0, s0, v_middle0[:, None]), 0)
        offset += tl.sum(weigh(p1, s1, v_middle1[:, None]), 0)
        new_top = greatest_scale(top, v_scale0, v_scale1)
        gain = HEADROOM / new_top
        w0 = weigh(p0, s0, (v_scale0 * gain)[:, None]).to(WEIGHT)
        w1 = weigh(p1, s1, (v_scale1 * gain)[:, None]).to(WEIGHT)
        v_page = v_pages_ptr + page * (V_DIM * V_BYTES)
        v_tile = d[:, None] * V_BYTES + j[None, :]  # [BLOCK_V, HALF] bytes
        v0, v1 = load_codes(v_page, v_tile, HALF, in_v, BITS, WEIGHT, PTX)
        acc *= (shrink * (top / new_top))[None, :]
        acc = mma(v1, w1, mma(v0, w0, acc))
        top = new_top

    if HAS_CHUNK:
        CHUNK_T: tl.constexpr = 16  # tokens per dot product: its least inner size
        k_chunk = k_chunk_ptr + b * k_chunk_stride_b + h.to(tl.int64) * k_chunk_stride_h
        v_chunk = v_chunk_ptr + b * v_chunk_stride_b + h.to(tl.int64) * v_chunk_stride_h
        # split 0 adds the chunk; staging it too would take the shared memory of other programs
        for start in tl.range(0, tl.where(split == 0, seq, 0), 2 * CHUNK_T, num_stages=1):
            u0 = start + tl.arange(0, CHUNK_T)
            u1 = u0 + CHUNK_T
            t0 = length - seq + u0  # negative where the chunk is longer than the sequence
            t1 = t0 + CHUNK_T
            seen0 = look(
                t0, length, in_row, position, mask_rows, mask_len, window,
                0, CAUSAL, HAS_MASK, HAS_WINDOW,
            )  # fmt: skip
            seen1 = look(
                t1, length, in_row, position, mask_rows, mask_len, window,
                0, CAUSAL, HAS_MASK, HAS_WINDOW,
            )  # fmt: skip
            none = tl.zeros((CHUNK_T, BLOCK_R), tl.float32)
            k0 = k_chunk + u0.to(tl.int64)[:, None] * k_chunk_stride_s
            k1 = k_chunk + u1.to(tl.int64)[:, None] * k_chunk_stride_s
            s0 = exact_scores(k0, q0, q1, c, (u0 < seq)[:, None], none, K_HALF)
            s1 = exact_scores(k1, q0, q1, c, (u1 < seq)[:, None], none, K_HALF)
            s0 = tl.where(seen0, s0 * log2_scale, float("-inf"))
            s1 = tl.where(seen1, s1 * log2_scale, float("-inf"))
            peak, total, shrink, p0, p1 = rise(peak, total, s0, s1, 0)
            offset *= shrink
            new_top = tl.maximum(top, 1.0)  # exact values are codes of scale 1
            gain = HEADROOM / new_top
            v_rows = v_chunk + u0.to(tl.int64)[None, :] * v_chunk_stride_s + d[:, None]
            in_v = (d < V_DIM)[:, None]
            v0 = tl.load(v_rows, mask=in_v & (u0 < seq)[None, :], other=0.0)
            v_rows += CHUNK_T * v_chunk_stride_s
            v1 = tl.load(v_rows, mask=in_v & (u1 < seq)[None, :], other=0.0)
            acc *= (shrink * (top / new_top))[None, :]
            v0 = v0.to(OPERAND)
            v1 = v1.to(OPERAND)
            high0, low0 = split_weights(p0 * gain, OPERAND)
            high1, low1 = split_weights(p1 * gain, OPERAND)
            acc = mma(v1, high1, mma(v0, high0, acc))
            if tl.bfloat16 == OPERAND:
                acc = mma(v1, low1, mma(v0, low0, acc))
            top = new_top

    out = acc * (top / HEADROOM) + offset[None, :]
    slot = ((b * HEADS + head) * seq + query) * splits + split
    # not `total > 0`: a NaN total has a NaN part to deliver
    filled = in_row & (total != 0)
    in_out = filled[None, :] & (d < V_DIM)[:, None]
    tl.store(part_ptr + slot[None, :] * V_DIM + d[:, None], out, mask=in_out)
    tl.store(stat_ptr + slot * 2, peak, mask=in_row)
    tl.store(stat_ptr + slot * 2 + 1, total, mask=in_row)


@triton.jit
def exact_scores(k_rows, q0, q1, c, in_row, none, K_HALF: tl.constexpr):
    """Scores [T, R] of exact keys at k_rows [T, 1] against both halves of q [C, R]."""
    inside = in_row & (c < K_HALF)[None, :]
    left = tl.load(k_rows + c[None, :], mask=inside, other=0.0).to(q0.dtype)
    right = tl.load(k_rows + K_HALF + c[None, :], mask=inside, other=0.0).to(q0.dtype)
    return mma(right, q1, mma(left, q0, none))


def takes(call: Call, spec: AttentionSpec) -> bool:
    """Whether a call is this kernel's: of few rows, without soft cap and sinks.

    attention_prefill.py has all others. Decode steps with those two are kv4_decode's.
    """
    return call.rows <= MAX_ROWS and not (spec.has_softcap or spec.has_sinks)


def launch(kernel: Launch, call: Call, sm_count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The partial results of kv4_attention: part fp32 [B, Hq, S, splits, Dv], stat [.., splits, 2].

    The grid follows from shapes alone, so the call can be captured in a CUDA graph.
    """
    q, pages = call.q, call.block_table.shape[1]
    batch, heads, seq = q.shape[:3]
    kv_heads, v_dim = call.v_pages.shape[1:3]
    row_tiles = ceil_div(call.rows, kernel.tile["BLOCK_R"])
    # as many pages as the windows of `seq` neighbours touch at most
    read = min(pages, ceil_div(call.window + seq - 2, PAGE) + 1) if call.window else pages
    splits = choose_splits(batch * kv_heads * row_tiles, read, sm_count)
    part = q.new_empty(batch, heads, seq, splits, v_dim, dtype=torch.float32)
    stat = q.new_empty(batch, heads, seq, splits, 2, dtype=torch.float32)
    if part.numel():
        grid = (batch * kv_heads, splits, row_tiles)
        kernel(grid, *call.arguments(), part, stat, call.scale, seq, pages, splits, call.window)
    return part, stat


def choose_splits(programs: int, pages: int, sm_count: int) -> int:
    """Into how many parts the pages of a sequence are divided, 1..MAX_SPLITS.

    Enough to fill the device CTAS_PER_SM times over, and two pages or more each when full.
    """
    wanted = ceil_div(sm_count * CTAS_PER_SM, max(1, programs))
    return max(1, min(wanted, ceil_div(pages, 2), MAX_SPLITS))


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> Tile:
    """One warp per eight rows of 128 channels: the fewer warps share rows, the fewer barriers."""
    rows = min(MAX_ROWS, size * (spec.heads // spec.kv.kv_heads))
    block = min(16, max(8, triton.next_power_of_2(rows)))
    registers = block * _width(spec)
    num_warps = 1 if registers <= 1024 else 2 if registers <= 2048 else 4
    return _tile(block, num_warps, 5, device)


def candidates(spec: AttentionSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Warps times stages for the rows there are."""
    first = heuristic(spec, size, device)
    tiles = {first: None}
    for num_warps in (1, 2, 4):
        for num_stages in (1, 3, 5, 7):
            tiles[_tile(first["BLOCK_R"], num_warps, num_stages, device)] = None
    return tuple(tiles)


def _tile(rows: int, num_warps: int, num_stages: int, device: DeviceKey) -> Tile:
    return Tile((("PTX", has_ptx(device)), ("BLOCK_R", rows)), num_warps, num_stages)


def _width(spec: AttentionSpec) -> int:
    """Registers' worth of a token: padded channels, fp32 ones counting four times."""
    width = max(2 * lanes(spec.kv.k_dim // 2), lanes(spec.kv.v_dim))
    return 4 * width if spec.dtype is torch.float32 else width


def shared_bytes(spec: AttentionSpec, tile: Tile) -> int:
    """Estimate of a block's shared memory: staged pages and words, and exchanges between warps."""
    page = PAGE * (2 * lanes(spec.kv.k_dim // 2) + lanes(spec.kv.v_dim)) * spec.kv.bits // 8
    words = 2 * PAGE * 4
    # Triton stages one page per two pipeline stages: the table entry takes the other
    staged = max(1, (tile.num_stages - 1) // 2) * (page + words)
    return staged + tile["BLOCK_R"] * (_width(spec) * 4 + PAGE * 2) + 1024


def trial(spec: AttentionSpec, size: int, device: torch.device) -> Trial:
    """Attend with `size` queries in each of 16 sequences to 4096 cached tokens."""
    call = trial_call(spec, 16, size, 4096, device)
    sm_count = device_key(device).sm_count

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        return launch(kernel, call, sm_count)

    return run


ATTENTION_DECODE = Family(
    "attention_decode",
    attention_decode,
    constexprs,
    heuristic,
    candidates,
    DECODE_SELFCHECK,
    trial,
    shared_bytes,
    tolerance=1e-2,
    fp_fusion=True,
)
