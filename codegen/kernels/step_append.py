"""The newest token of each sequence: turn q and k, quantize k and v, put them into their page.

q [B, Hq, 1, Dk] -> q_out [B, Hq, Dk]; k, v [B, H, 1, D] -> the pages at position length[b], which
step_attend.py or step_combine.py counts. Definitions: ir/rotary.py, quant/kv.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.kernels.kv_append import put_keys, put_values
from qoqc.codegen.kernels.pieces_rotary import NO_ROTARY, prepared


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
    page = tl.load(table_ptr + b * table_stride + length // (2 * HALF), mask=fits, other=0)
    page_head = page.to(tl.int64) * KV_HEADS + h
    slot = (tl.where(fits, length, 0) % (2 * HALF)).to(tl.int32) + tl.arange(0, 1)
    new = fits & (slot >= 0)  # [1]
    k_page = k_pages_ptr + page_head * (2 * HALF * (K_DIM * BITS // 8))
    v_page = v_pages_ptr + page_head * (V_DIM * 8 * BITS)
    words = words_ptr + page_head * (4 * HALF)
    cos0, sin0, cos1, sin1 = 0.0, 0.0, 0.0, 0.0
    if FORM != NO_ROTARY:
        turns0 = in_c & (c < ROTATED)[None, :]
        turns1 = in_c & (c + K_HALF < ROTATED)[None, :]
        cos = cos_ptr + b * cos_stride + c[None, :]
        sin = sin_ptr + b * sin_stride + c[None, :]
        cos0 = tl.load(cos, mask=turns0, other=1.0).to(tl.float32)
        sin0 = tl.load(sin, mask=turns0, other=0.0).to(tl.float32)
        cos1 = tl.load(cos + K_HALF, mask=turns1, other=1.0).to(tl.float32)
        sin1 = tl.load(sin + K_HALF, mask=turns1, other=0.0).to(tl.float32)
    k0, k1 = prepared(
        k_ptr + b * k_stride_b + h * k_stride_h, c, in_c, k_weight_ptr, eps, cos0, sin0, cos1, sin1,
        K_HALF, FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
    )  # fmt: skip
    put_keys(k0, k1, in_c & fits, new, k_page, words, slot, c, K_HALF, BITS)
    v_row = v_ptr + b * v_stride_b + h * v_stride_h
    put_values(
        v_row, 0, slot, slot, new & (slot < HALF), new & (slot >= HALF), v_page, words, slot % HALF,
        V_DIM, BITS, BLOCK_V,
    )  # fmt: skip

    row = tl.arange(0, GROUP_R)
    head = h * GROUP + row[:, None]
    in_q = (row < GROUP)[:, None] & in_c
    q0, q1 = prepared(
        q_ptr + b * q_stride_b + head * q_stride_h, c, in_q, q_weight_ptr, eps,
        cos0, sin0, cos1, sin1,
        K_HALF, FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
    )  # fmt: skip
    q_out = q_out_ptr + (b * HEADS + head) * K_DIM + c[None, :]
    tl.store(q_out, q0.to(KIND), mask=in_q)
    tl.store(q_out + K_HALF, q1.to(KIND), mask=in_q)
