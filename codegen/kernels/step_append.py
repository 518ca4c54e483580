"""The newest token of each sequence: turn q and k, quantize k and v, put them into their page.

q [B, Hq, 1, Dk] -> q_out [B, Hq, Dk]; k, v [B, H, 1, D] -> the pages at position length[b], which
step_attend.py or step_combine.py counts. Definitions: ir/rotary.py, quant/kv.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.kernels.kv_append import codes_of, extent, grid_of
from qoqc.codegen.kernels.pieces_rotary import inverse_rms, turned_halves


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "k_stride_b", "k_stride_h", "v_stride_b", "v_stride_h",
        "cos_stride", "sin_stride", "table_stride", "length_stride", "pages",
    ]
)  # fmt: skip
def step_append(
    q_ptr, q_stride_b, q_stride_h,
    k_ptr, k_stride_b, k_stride_h,
    v_ptr, v_stride_b, v_stride_h,
    q_weight_ptr, k_weight_ptr,
    cos_ptr, cos_stride, sin_ptr, sin_stride,
    k_pages_ptr, v_pages_ptr, words_ptr,
    table_ptr, table_stride,
    length_ptr, length_stride,
    q_out_ptr,
    eps,
    pages,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP_R: tl.constexpr,
):  # fmt: skip
    """One (sequence, KV head) with its query heads; a token without room is not written."""
    HALF: tl.constexpr = 32
    GROUP: tl.constexpr = HEADS // KV_HEADS
    K_HALF: tl.constexpr = K_DIM // 2
    K_BYTES: tl.constexpr = K_DIM * BITS // 8
    V_BYTES: tl.constexpr = 8 * BITS
    TOP: tl.constexpr = 15.0 if BITS == 4 else 255.0
    if DEPENDENT:
        gdc_wait()
        # after the wait: what comes next may then rely on all that came before this kernel
        gdc_launch_dependents()
    b = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    h = tl.program_id(0) % KV_HEADS
    length = tl.load(length_ptr + b * length_stride)
    fits = (length >= 0) & (length < pages * (2 * HALF))
    c = tl.arange(0, BLOCK_C)
    in_c = (c < K_HALF)[None, :]
    d = tl.arange(0, BLOCK_V)
    in_d = (d < V_DIM)[None, :]
    cos = cos_ptr + b * cos_stride
    sin = sin_ptr + b * sin_stride
    page = tl.load(table_ptr + b * table_stride + length // (2 * HALF), mask=fits, other=0)
    page_head = page.to(tl.int64) * KV_HEADS + h
    slot = (tl.where(fits, length, 0) % (2 * HALF)).to(tl.int32)
    v_target = v_pages_ptr + page_head * (V_DIM * V_BYTES) + d[None, :] * V_BYTES
    if BITS == 4:
        v_target += slot % HALF
        old = tl.load(v_target, mask=in_d & fits, other=0).to(tl.int32)

    k_row = k_ptr + b * k_stride_b + h * k_stride_h
    inverse = tl.zeros((1, 1), tl.float32)
    if NORMED:
        y0 = tl.load(k_row + c[None, :], mask=in_c, other=0.0).to(tl.float32)
        y1 = tl.load(k_row + K_HALF + c[None, :], mask=in_c, other=0.0).to(tl.float32)
        inverse = inverse_rms(tl.sum(y0 * y0, 1) + tl.sum(y1 * y1, 1), eps, K_DIM)[:, None]
    k0, k1 = turned_halves(
        k_row, c[None, :], in_c, inverse, k_weight_ptr, cos, sin, K_HALF,
        FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
    )  # fmt: skip
    low0, high0, broken0 = extent(k0, in_c)
    low1, high1, broken1 = extent(k1, in_c)
    low, steps, k_word = grid_of(
        tl.minimum(low0, low1), tl.maximum(high0, high1), broken0 | broken1, TOP
    )
    k0_codes = codes_of(k0, low, steps, TOP)
    k1_codes = codes_of(k1, low, steps, TOP)
    v_row = v_ptr + b * v_stride_b + h * v_stride_h
    value = tl.load(v_row + d[None, :], mask=in_d, other=0.0).to(tl.float32)
    v_low, v_high, v_broken = extent(value, in_d)
    low, steps, v_word = grid_of(v_low, v_high, v_broken, TOP)
    v_codes = codes_of(value, low, steps, TOP)

    k_target = k_pages_ptr + page_head * (2 * HALF * K_BYTES) + slot * K_BYTES + c[None, :]
    if BITS == 4:
        tl.store(k_target, (k0_codes | (k1_codes << 4)).to(tl.uint8), mask=in_c & fits)
        shift = 4 * (slot // HALF)
        merged = (old & (240 >> shift)) | (v_codes << shift)
        tl.store(v_target, merged.to(tl.uint8), mask=in_d & fits)
    else:
        tl.store(k_target, k0_codes.to(tl.uint8), mask=in_c & fits)
        tl.store(k_target + K_HALF, k1_codes.to(tl.uint8), mask=in_c & fits)
        tl.store(v_target + slot, v_codes.to(tl.uint8), mask=in_d & fits)
    words = words_ptr + page_head * (4 * HALF) + slot + tl.arange(0, 1)
    tl.store(words, k_word, mask=fits)
    tl.store(words + 2 * HALF, v_word, mask=fits)

    row = tl.arange(0, GROUP_R)
    head = h * GROUP + row[:, None]
    in_q = (row < GROUP)[:, None] & in_c
    q_rows = q_ptr + b * q_stride_b + head * q_stride_h
    inverse = tl.zeros((GROUP_R, 1), tl.float32)
    if NORMED:
        x0 = tl.load(q_rows + c[None, :], mask=in_q, other=0.0).to(tl.float32)
        x1 = tl.load(q_rows + K_HALF + c[None, :], mask=in_q, other=0.0).to(tl.float32)
        inverse = inverse_rms(tl.sum(x0 * x0, 1) + tl.sum(x1 * x1, 1), eps, K_DIM)[:, None]
    q0, q1 = turned_halves(
        q_rows, c[None, :], in_q, inverse, q_weight_ptr, cos, sin, K_HALF,
        FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
    )  # fmt: skip
    q_out = q_out_ptr + (b * HEADS + head) * K_DIM + c[None, :]
    tl.store(q_out, q0.to(KIND), mask=in_q)
    tl.store(q_out + K_HALF, q1.to(KIND), mask=in_q)
