"""New tokens into the cache in one pass: norm and rotate q and k, quantize and append k and v.

q [B, Hq, S, Dk], k [B, H, S, Dk], v [B, H, S, Dv], cos, sin [B or 1, S, R] -> q and k as attention
reads them, and the pages of kv_append.py at positions start[b] + 0..S-1. Twin: ir/kv_reference.py
kv_rotate_append, bit for bit without a head norm.

A program owns the slots of kv_append.py in one KV head, and the query heads of its group: their
angles are loaded once. The heads of the same tokens are neighbours in the grid, as they are in the
output of a projection, which is what q, k and v are views of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qoqc.codegen.kernels.kv_append import put_keys, put_values, slots_of
from qoqc.codegen.kernels.pieces_rotary import NO_ROTARY, prepared


@triton.jit(do_not_specialize=["seq", "pages", "table_stride", "start_stride", "eps"])
def kv_rotate_append(
    q_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_ptr,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    cos_stride_b,
    cos_stride_s,
    sin_ptr,
    sin_stride_b,
    sin_stride_s,
    k_pages_ptr,
    v_pages_ptr,
    words_ptr,
    table_ptr,
    table_stride,
    start_ptr,
    start_stride,
    q_out_ptr,
    k_out_ptr,
    eps,
    seq,
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
    SINGLE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Prepare and append `seq` tokens; SINGLE: seq is 1, and one program covers its slot."""
    HALF: tl.constexpr = 32
    K_HALF: tl.constexpr = K_DIM // 2
    GROUP: tl.constexpr = HEADS // KV_HEADS
    b = tl.program_id(1).to(tl.int64)
    h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    number = tl.program_id(0) // KV_HEADS
    start = tl.load(start_ptr + b * start_stride)
    block_page, inside, j, token0, token1, new0, new1 = slots_of(
        start, number, seq, pages, SINGLE, BLOCK_J
    )
    page = tl.load(table_ptr + b * table_stride + block_page, mask=inside, other=0).to(tl.int64)
    page_head = page * KV_HEADS + h
    k_page = k_pages_ptr + page_head * (2 * HALF * (K_DIM * BITS // 8))
    v_page = v_pages_ptr + page_head * (V_DIM * 8 * BITS)
    words = words_ptr + page_head * (4 * HALF)

    c = tl.arange(0, BLOCK_K)
    in_c = (c < K_HALF)[None, :]
    for half in tl.static_range(2):
        token = token0 if half == 0 else token1
        new = new0 if half == 0 else new1
        # queries and keys are prepared for tokens past the table, too: attention reads them
        given = (token >= 0) & (token < seq)
        live = given[:, None] & in_c
        row = token[:, None]
        cos0, sin0, cos1, sin1 = 0.0, 0.0, 0.0, 0.0
        if FORM != NO_ROTARY:
            turns0 = live & (c < ROTATED)[None, :]
            turns1 = live & (c + K_HALF < ROTATED)[None, :]
            cos = cos_ptr + b * cos_stride_b + row * cos_stride_s + c[None, :]
            sin = sin_ptr + b * sin_stride_b + row * sin_stride_s + c[None, :]
            cos0 = tl.load(cos, mask=turns0, other=1.0).to(tl.float32)
            sin0 = tl.load(sin, mask=turns0, other=0.0).to(tl.float32)
            cos1 = tl.load(cos + K_HALF, mask=turns1, other=1.0).to(tl.float32)
            sin1 = tl.load(sin + K_HALF, mask=turns1, other=0.0).to(tl.float32)

        left, right = prepared(
            k_ptr + b * k_stride_b + h * k_stride_h + row * k_stride_s, c, live, k_weight_ptr, eps,
            cos0, sin0, cos1, sin1, K_HALF, FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND,
            ROUND_BF16,
        )  # fmt: skip
        k_out = k_out_ptr + ((b * KV_HEADS + h) * seq + row) * K_DIM + c[None, :]
        tl.store(k_out, left.to(KIND), mask=live)
        tl.store(k_out + K_HALF, right.to(KIND), mask=live)
        put_keys(
            left, right, new[:, None] & in_c, new, k_page, words, j + half * HALF, c, K_HALF, BITS
        )
        for member in range(GROUP):
            head = h * GROUP + member
            left, right = prepared(
                q_ptr + b * q_stride_b + head * q_stride_h + row * q_stride_s, c, live,
                q_weight_ptr, eps, cos0, sin0, cos1, sin1, K_HALF, FORM, ROTATED, NORMED, OFFSET,
                ROUND_FIRST, KIND, ROUND_BF16,
            )  # fmt: skip
            q_out = q_out_ptr + ((b * HEADS + head) * seq + row) * K_DIM + c[None, :]
            tl.store(q_out, left.to(KIND), mask=live)
            tl.store(q_out + K_HALF, right.to(KIND), mask=live)

    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    put_values(
        v_base, v_stride_s, token0, token1, new0, new1, v_page, words, j, V_DIM, BITS, BLOCK_V
    )  # fmt: skip
