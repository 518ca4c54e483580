"""Attention of many queries per sequence: new tokens over themselves and the pages before them.

q [B, Hq, S, Dk] -> out [B, Hq, S, Dv]. A program takes BLOCK_R rows of one KV head, a row being a
(query, head of its group) pair, so that all heads of a group share each unpacked page. Twin:
ir/kv_reference.py kv_attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import (
    Call,
    constexprs,
    has_ptx,
    lanes,
    round_bf16,
    trial_call,
)
from qoqc.codegen.kernels.kv_selfcheck import PREFILL_SELFCHECK
from qoqc.codegen.kernels.pieces import round_to_bf16
from qoqc.codegen.kernels.pieces_kv import (
    HEADROOM,
    LOG2E,
    SMALLEST_SCALE,
    capped,
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
from qoqc.runtime.device import DeviceKey


@triton.jit(
    do_not_specialize=[
        "table_stride", "length_stride", "mask_stride_b", "mask_stride_h", "mask_stride_s",
        "mask_len", "seq", "pages", "window",
    ]
)  # fmt: skip
def attention_prefill(
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
    out_ptr,
    scale,
    seq,
    pages,
    softcap,
    sinks_ptr,
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
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    OPERAND: tl.constexpr,
    WEIGHT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGE_STAGES: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """Row tile `program_id(0)`, from the last, of KV head `program_id(1)` of one sequence.

    BLOCK_T exact tokens of the chunk are taken at once; pages are taken whole.
    """
    HALF: tl.constexpr = 32
    GROUP: tl.constexpr = HEADS // KV_HEADS
    K_HALF: tl.constexpr = K_DIM // 2
    K_BYTES: tl.constexpr = K_DIM * BITS // 8
    V_BYTES: tl.constexpr = 8 * BITS
    CENTRE: tl.constexpr = 8.0 if BITS == 4 else 128.0
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    true_length = tl.load(length_ptr + b * length_stride)
    # a longer sequence has no table entries to read: it gives NaN
    overflow = true_length > pages * (2 * HALF)
    length = tl.where(overflow, 0, tl.maximum(true_length, 0)).to(tl.int32)

    # the last rows see most under a causal mask: start them first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    query = row // GROUP
    head = (h * GROUP + row % GROUP).to(tl.int64)
    in_row = query < seq
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_V)
    j = tl.arange(0, HALF)
    in_q = in_row[:, None] & (c < K_HALF)[None, :]
    wide_query = query.to(tl.int64)
    q_rows = q_ptr + b * q_stride_b + (head * q_stride_h + wide_query * q_stride_s)[:, None]
    q0 = tl.load(q_rows + c[None, :], mask=in_q, other=0.0)  # [BLOCK_R, BLOCK_C]
    q1 = tl.load(q_rows + K_HALF + c[None, :], mask=in_q, other=0.0)
    q_sum = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
    q0 = q0.to(OPERAND)
    q1 = q1.to(OPERAND)
    log2_scale = scale * LOG2E
    log2_cap = softcap * LOG2E
    position = length - seq + query
    mask_rows = mask_ptr + b * mask_stride_b
    mask_rows += (head * mask_stride_h + wide_query * mask_stride_s)[:, None]
    cached = tl.maximum(length - seq, 0) if HAS_CHUNK else length

    # no row of this tile sees a token outside begin..end-1
    begin = 0
    end = length
    if CAUSAL:
        last_query = tl.minimum((tile * BLOCK_R + BLOCK_R - 1) // GROUP, seq - 1)
        end = tl.minimum(length, tl.maximum(length - seq + last_query + 1, 0))
    if HAS_WINDOW:
        begin = tl.maximum(length - seq + tile * BLOCK_R // GROUP + 1 - window, 0)
        begin = tl.minimum(begin, end)
    if HAS_MASK:
        mask_begin = end
        mask_end = 0
        for t in tl.range(begin // (2 * HALF) * (2 * HALF), end, 2 * HALF, num_stages=1):
            token = t + tl.arange(0, 2 * HALF)
            seen = look(
                token, end, in_row, position, mask_rows, mask_len, window,
                1, CAUSAL, HAS_MASK, HAS_WINDOW,
            )  # fmt: skip
            any_seen = tl.max(tl.max(seen.to(tl.int32), 0), 0) != 0
            mask_begin = tl.minimum(mask_begin, tl.where(any_seen, t, end))
            mask_end = tl.where(any_seen, t + 2 * HALF, mask_end)
        begin = mask_begin
        end = tl.minimum(end, mask_end)

    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    offset = tl.zeros((BLOCK_R,), tl.float32)  # sum of p * middle
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)  # sum of p * value scale * gain * codes
    top = SMALLEST_SCALE

    cached_end = tl.minimum(cached, end)
    first_page = begin // (2 * HALF)
    end_page = (cached_end + 2 * HALF - 1) // (2 * HALF)
    for i in tl.range(first_page, end_page, num_stages=PAGE_STAGES):
        page = tl.load(table_ptr + b * table_stride + i).to(tl.int64) * KV_HEADS + h
        t0 = i * (2 * HALF) + j
        t1 = t0 + HALF
        # words past the end are stale; read as zeros they cannot spread a NaN
        words = words_ptr + page * (4 * HALF) + j
        live0 = t0 < cached
        live1 = t1 < cached
        k_scale0, k_middle0 = split_word(tl.load(words, mask=live0, other=0), CENTRE)
        k_scale1, k_middle1 = split_word(tl.load(words + HALF, mask=live1, other=0), CENTRE)
        v_scale0, v_middle0 = split_word(tl.load(words + 2 * HALF, mask=live0, other=0), CENTRE)
        v_scale1, v_middle1 = split_word(tl.load(words + 3 * HALF, mask=live1, other=0), CENTRE)

        in_k = (c < K_HALF)[None, :]
        k_page = k_pages_ptr + page * (2 * HALF * K_BYTES)
        k_tile = j[:, None] * K_BYTES + c[None, :]  # [HALF, BLOCK_C] bytes
        k00, k01 = load_codes(k_page, k_tile, K_HALF, in_k, BITS, OPERAND, PTX)
        k_page += HALF * K_BYTES
        k10, k11 = load_codes(k_page, k_tile, K_HALF, in_k, BITS, OPERAND, PTX)
        none = tl.zeros((BLOCK_R, HALF), tl.float32)
        s0 = mma(q1, k01.T, mma(q0, k00.T, none))  # [BLOCK_R, HALF]
        s1 = mma(q1, k11.T, mma(q0, k10.T, none))
        s0 = (s0 * k_scale0[None, :] + q_sum[:, None] * k_middle0[None, :]) * log2_scale
        s1 = (s1 * k_scale1[None, :] + q_sum[:, None] * k_middle1[None, :]) * log2_scale
        s0 = capped(s0, log2_cap, HAS_SOFTCAP)
        s1 = capped(s1, log2_cap, HAS_SOFTCAP)
        seen0 = look(
            t0, cached, in_row, position, mask_rows, mask_len, window,
            1, CAUSAL, HAS_MASK, HAS_WINDOW,
        )  # fmt: skip
        seen1 = look(
            t1, cached, in_row, position, mask_rows, mask_len, window,
            1, CAUSAL, HAS_MASK, HAS_WINDOW,
        )  # fmt: skip
        s0 = tl.where(seen0, s0, float("-inf"))
        s1 = tl.where(seen1, s1, float("-inf"))

        peak, total, shrink, p0, p1 = rise(peak, total, s0, s1, 1)
        offset *= shrink
        offset += tl.sum(weigh(p0, s0, v_middle0[None, :]), 1)
        offset += tl.sum(weigh(p1, s1, v_middle1[None, :]), 1)
        new_top = greatest_scale(top, v_scale0, v_scale1)
        gain = HEADROOM / new_top
        w0 = weigh(p0, s0, (v_scale0 * gain)[None, :]).to(WEIGHT)
        w1 = weigh(p1, s1, (v_scale1 * gain)[None, :]).to(WEIGHT)
        v_page = v_pages_ptr + page * (V_DIM * V_BYTES)
        v_tile = d[:, None] * V_BYTES + j[None, :]  # [BLOCK_V, HALF] bytes
        v0, v1 = load_codes(v_page, v_tile, HALF, (d < V_DIM)[:, None], BITS, WEIGHT, PTX)
        acc *= (shrink * (top / new_top))[:, None]
        acc = mma(w1, v1.T, mma(w0, v0.T, acc))
        top = new_top

    if HAS_CHUNK:
        # exact values are codes of scale 1
        new_top = tl.maximum(top, 1.0)
        acc *= top / new_top
        top = new_top
        gain = HEADROOM / top
        origin = length - seq  # negative where the chunk is longer than the sequence
        k_chunk = k_chunk_ptr + b * k_chunk_stride_b + h.to(tl.int64) * k_chunk_stride_h
        v_chunk = v_chunk_ptr + b * v_chunk_stride_b + h.to(tl.int64) * v_chunk_stride_h
        if HAS_WINDOW and not HAS_MASK:
            # the same as below, without a register that lasts from before the pages
            oldest = tl.maximum(tile * BLOCK_R // GROUP + 1 - window, -origin)
            first = tl.maximum(oldest, 0) // BLOCK_T * BLOCK_T
        else:
            first = tl.maximum(begin - origin, 0) // BLOCK_T * BLOCK_T
        for start in range(first, end - origin, BLOCK_T):
            u = start + tl.arange(0, BLOCK_T)
            wide = u.to(tl.int64)
            k_rows = k_chunk + wide[None, :] * k_chunk_stride_s + c[:, None]
            v_rows = v_chunk + wide[:, None] * v_chunk_stride_s + d[None, :]
            in_k = (u < seq)[None, :] & (c < K_HALF)[:, None]
            in_v = (u < seq)[:, None] & (d < V_DIM)[None, :]
            k0 = tl.load(k_rows, mask=in_k, other=0.0)  # [BLOCK_C, BLOCK_T]
            k1 = tl.load(k_rows + K_HALF, mask=in_k, other=0.0)
            v = tl.load(v_rows, mask=in_v, other=0.0)  # [BLOCK_T, BLOCK_V]
            none = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
            s = mma(q1, k1.to(OPERAND), mma(q0, k0.to(OPERAND), none))
            seen = look(
                origin + u, length, in_row, position, mask_rows, mask_len, window,
                1, CAUSAL, HAS_MASK, HAS_WINDOW,
            )  # fmt: skip
            s = tl.where(seen, capped(s * log2_scale, log2_cap, HAS_SOFTCAP), float("-inf"))
            peak, shrink, p = rise_one(peak, s)
            total = total * shrink + tl.sum(p, 1)
            offset *= shrink
            high, low = split_weights(p * gain, OPERAND)
            v = v.to(OPERAND)
            acc = mma(high, v, acc * shrink[:, None])
            if tl.bfloat16 == OPERAND:
                acc = mma(low, v, acc)

    out = acc * (top / HEADROOM) + offset[:, None]
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=in_row, other=0.0).to(tl.float32) * LOG2E
        summit = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - summit)
        total = total * shrink + tl.exp2(sink - summit)
        out *= shrink[:, None]
    empty = total == 0
    out = tl.where(empty[:, None], 0.0, out / tl.where(empty, 1.0, total)[:, None])
    out = tl.where(overflow, float("nan"), out)
    if ROUND_BF16:
        out = round_to_bf16(out)
    out_rows = out_ptr + (((b * HEADS + head) * seq + query) * V_DIM)[:, None] + d[None, :]
    in_out = in_row[:, None] & (d < V_DIM)[None, :]
    tl.store(out_rows, out.to(out_ptr.dtype.element_ty), mask=in_out)


@triton.jit
def rise_one(peak, s):
    """`rise` for one tile [R, T]: the new peak, the shrinking of older sums, and p."""
    new = tl.maximum(peak, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(peak - base), tl.exp2(s - base[:, None])


def launch(kernel: Launch, call: Call) -> torch.Tensor:
    """kv4_attention by the plain form: out [B, Hq, S, Dv] in q's dtype."""
    out = call.empty_out()
    if out.numel():
        start(kernel, call, out)
    return out


def start(kernel: Launch, call: Call, out: torch.Tensor) -> None:
    """Launch on checked tensors, see Call; `out` has elements."""
    batch, kv_heads, seq = call.q.shape[0], call.k_pages.shape[1], call.q.shape[2]
    grid = (ceil_div(call.rows, kernel.tile["BLOCK_R"]), kv_heads, batch)
    kernel(
        grid, *call.arguments(), out, call.scale, seq, call.block_table.shape[1], call.softcap,
        out if call.sinks is None else call.sinks, call.window,
    )  # fmt: skip


def bind(spec: AttentionSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `attention_prefill`."""
    return {
        **constexprs(spec, tile),
        "HAS_SOFTCAP": spec.has_softcap,
        "HAS_SINKS": spec.has_sinks,
        "ROUND_BF16": round_bf16(spec, tile),
    }


def shared_bytes(spec: AttentionSpec, tile: Tile) -> int:
    """Estimate of a block's shared memory: q and the staged chunk tiles, or a page's operands."""
    size = 4 if spec.dtype is torch.float32 else 2
    rows, tokens = tile["BLOCK_R"], tile["BLOCK_T"]
    k_lanes, v_lanes = 2 * lanes(spec.kv.k_dim // 2), lanes(spec.kv.v_dim)
    staged = tile.num_stages * tokens * (k_lanes + v_lanes) * size if spec.has_chunk else 0
    page = PAGE * (k_lanes + v_lanes) * size
    # a mask tile changes its layout by way of shared memory
    mask = rows * PAGE * 2 if spec.has_mask else 0
    return rows * k_lanes * size + max(staged, page * tile["PAGE_STAGES"]) + mask


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> Tile:
    """The largest tile that neither spills nor overflows: fewer rows and tokens for wide heads."""
    choices = [(128, 64, 8), (128, 32, 8), (64, 32, 8), (32, 32, 8), (16, 16, 4)]
    if _width(spec) > 128:
        choices = choices[3:]
    tiles = [_tile(rows, tokens, warps, 2, device) for rows, tokens, warps in choices]
    return next((t for t in tiles if shared_bytes(spec, t) <= device.shared_bytes), tiles[-1])


def candidates(spec: AttentionSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Row and token tiles, warps and stages that fit in shared memory."""
    tiles = {heuristic(spec, size, device): None}
    for rows, num_warps in ((32, 4), (64, 4), (128, 4), (128, 8)):
        for tokens in (32, 64, 128):
            for num_stages, page_stages in ((1, 1), (2, 1), (3, 1), (2, 2)):
                tile = _tile(rows, tokens, num_warps, num_stages, device, page_stages)
                if shared_bytes(spec, tile) <= device.shared_bytes:
                    tiles[tile] = None
    return tuple(tiles)


def _width(spec: AttentionSpec) -> int:
    """Registers' worth of a row: padded channels, fp32 ones counting twice."""
    width = max(2 * lanes(spec.kv.k_dim // 2), lanes(spec.kv.v_dim))
    return 2 * width if spec.dtype is torch.float32 else width


def _tile(
    rows: int,
    tokens: int,
    num_warps: int,
    num_stages: int,
    device: DeviceKey,
    page_stages: int = 1,
) -> Tile:
    names = {"PTX": has_ptx(device), "BLOCK_R": rows, "BLOCK_T": tokens, "PAGE_STAGES": page_stages}
    return Tile(tuple(names.items()), num_warps, num_stages)


def trial(spec: AttentionSpec, size: int, device: torch.device) -> Trial:
    """Attend with `size` queries to themselves and 1024 tokens before them."""
    call = trial_call(spec, 1, size, 1024, device)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        out = call.empty_out()
        start(kernel, call, out)
        return (out,)

    return run


ATTENTION_PREFILL = Family(
    "attention_prefill",
    attention_prefill,
    bind,
    heuristic,
    candidates,
    PREFILL_SELFCHECK,
    trial,
    shared_bytes,
    tolerance=1e-2,
    fp_fusion=True,
)
