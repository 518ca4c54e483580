"""New tokens into the cache in one pass: norm and rotate q and k, quantize and append k and v.

q [B, Hq, S, Dk], k [B, H, S, Dk], v [B, H, S, Dv], cos, sin [B or 1, S, R] -> q and k as attention
reads them, and the pages of kv_append.py at positions start[b] + 0..S-1. Twin: ir/kv_reference.py
kv_rotate_append, bit for bit without a head norm.

Some programs own the slots of kv_append.py in one KV head each; the others turn BLOCK_R queries
each. Tokens and heads are dealt out in the order of a projection's output, which is what
q, k and v are views of. All loads of the queries of a program are under way at once.
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
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Prepare and append `seq` tokens; SINGLE: seq is 1, and one program covers its slot."""
    HALF: tl.constexpr = 32
    K_HALF: tl.constexpr = K_DIM // 2
    b = tl.program_id(1).to(tl.int64)
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_K)
    appends = append_programs(seq, KV_HEADS, SINGLE, BLOCK_J)
    # appends compute, turning queries moves bytes: in turns they do so at the same time
    period = (seq * HEADS + BLOCK_R - 1) // BLOCK_R // appends + 1
    turn = pid // period
    if (pid % period != 0) | (turn >= appends):
        before = tl.minimum((pid + period - 1) // period, appends)
        one = (pid - before).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        query = one // HEADS
        head = one % HEADS
        asked = (query < seq)[:, None] & (c < K_HALF)[None, :]
        q_cos0, q_sin0, q_cos1, q_sin1 = angles_of(
            cos_ptr + b * cos_stride_b, cos_stride_s, sin_ptr + b * sin_stride_b, sin_stride_s,
            query, asked, c, K_HALF, FORM, ROTATED,
        )  # fmt: skip
        q_left, q_right = prepared(
            q_ptr + b * q_stride_b + (head * q_stride_h + query * q_stride_s)[:, None], c, asked,
            q_weight_ptr, eps, q_cos0, q_sin0, q_cos1, q_sin1, K_HALF, FORM, ROTATED, NORMED,
            OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
        )  # fmt: skip
        q_out = q_out_ptr + ((b * HEADS + head) * seq + query)[:, None] * K_DIM + c[None, :]
        tl.store(q_out, q_left.to(KIND), mask=asked)
        tl.store(q_out + K_HALF, q_right.to(KIND), mask=asked)
    else:
        h = (turn % KV_HEADS).to(tl.int64)
        start = tl.load(start_ptr + b * start_stride)
        block_page, inside, first, token, whole = slots_of(
            start, turn // KV_HEADS, seq, pages, SINGLE, BLOCK_J
        )
        page = tl.load(table_ptr + b * table_stride + block_page, mask=inside, other=0)
        page_head = page.to(tl.int64) * KV_HEADS + h
        k_page = k_pages_ptr + page_head * (2 * HALF * (K_DIM * BITS // 8))
        v_page = v_pages_ptr + page_head * (V_DIM * 8 * BITS)
        words = words_ptr + page_head * (4 * HALF)

        # keys of both halves at once: row r is slot r % BLOCK_J of half r // BLOCK_J
        r = tl.arange(0, 2 * BLOCK_J)
        row = r % BLOCK_J + r // BLOCK_J * HALF
        # keys are prepared for tokens past the table, too: attention reads them
        given = (token + row >= 0) & (token + row < seq)
        live = given[:, None] & (c < K_HALF)[None, :]
        place = (token + row).to(tl.int64)
        cos0, sin0, cos1, sin1 = angles_of(
            cos_ptr + b * cos_stride_b, cos_stride_s, sin_ptr + b * sin_stride_b, sin_stride_s,
            place, live, c, K_HALF, FORM, ROTATED,
        )  # fmt: skip
        left, right = prepared(
            k_ptr + b * k_stride_b + h * k_stride_h + place[:, None] * k_stride_s, c, live,
            k_weight_ptr, eps, cos0, sin0, cos1, sin1, K_HALF, FORM, ROTATED, NORMED, OFFSET,
            ROUND_FIRST, KIND, ROUND_BF16,
        )  # fmt: skip
        k_out = k_out_ptr + ((b * KV_HEADS + h) * seq + place)[:, None] * K_DIM + c[None, :]
        tl.store(k_out, left.to(KIND), mask=live)
        tl.store(k_out + K_HALF, right.to(KIND), mask=live)
        new = given & inside
        put_keys(
            left, right, new[:, None] & (c < K_HALF)[None, :], new, k_page, words, first + row, c,
            K_HALF, BITS,
        )  # fmt: skip
        v_base = v_ptr + b * v_stride_b + h * v_stride_h
        put_values(
            v_base, v_stride_s, first, token, inside, whole, seq, v_page, words, V_DIM, BITS,
            BLOCK_J, BLOCK_V,
        )  # fmt: skip


@triton.jit
def append_programs(seq, KV_HEADS: tl.constexpr, SINGLE: tl.constexpr, BLOCK_J: tl.constexpr):
    """How many programs append; a chunk that may start anywhere in a page touches most pages."""
    return KV_HEADS if SINGLE else (seq + 126) // 64 * (32 // BLOCK_J) * KV_HEADS


@triton.jit
def angles_of(
    cos, cos_stride_s, sin, sin_stride_s, token, live, c,
    K_HALF: tl.constexpr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of channels c and c + K_HALF, fp32 [T, C]; 1 and 0 for those that stay."""
    cos0, sin0, cos1, sin1 = 0.0, 0.0, 0.0, 0.0
    if FORM != NO_ROTARY:
        cos += token[:, None] * cos_stride_s + c[None, :]
        sin += token[:, None] * sin_stride_s + c[None, :]
        turns0 = live & (c < ROTATED)[None, :]
        turns1 = live & (c + K_HALF < ROTATED)[None, :]
        cos0 = tl.load(cos, mask=turns0, other=1.0).to(tl.float32)
        sin0 = tl.load(sin, mask=turns0, other=0.0).to(tl.float32)
        cos1 = tl.load(cos + K_HALF, mask=turns1, other=1.0).to(tl.float32)
        sin1 = tl.load(sin + K_HALF, mask=turns1, other=0.0).to(tl.float32)
    return cos0, sin0, cos1, sin1
