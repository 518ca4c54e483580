"""New tokens into the cache in one pass: norm and rotate q and k, quantize and append k and v.

q [B, Hq, S, Dk], k [B, H, S, Dk], v [B, H, S, Dv], cos, sin [B or 1, S, R] -> q and k as attention
reads them, and the pages of kv_append.py at positions start[b] + 0..S-1. Twin: ir/kv_reference.py
kv_rotate_append, bit for bit without a head norm.

Some programs own the slots of kv_append.py in one KV head each; the others turn the queries of
BLOCK_H heads of BLOCK_T tokens. Tokens and heads are dealt out in the order of a projection's
output, which is what q, k and v are views of. All loads of a program are under way at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qoqc.codegen.kernels.kv_append import slots_of
from qoqc.codegen.kernels.kv_values import load_values, put_values
from qoqc.codegen.kernels.pieces import rounded
from qoqc.codegen.kernels.pieces_codes import (
    codes_of,
    extent_of,
    grid_of,
    nan_max,
    nan_min,
    two_codes,
    widened,
)
from qoqc.codegen.kernels.pieces_rotary import HALVES, NO_ROTARY, prepared


@triton.jit(do_not_specialize=["seq", "pages", "table_stride", "start_stride", "eps", "share"])
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
    share,
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
    PTX: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Prepare and append `seq` tokens; SINGLE: seq is 1, and one program covers its slot.

    share  the part of a sequence's programs that append, times 2**31 and rounded up
    """
    HALF: tl.constexpr = 32
    K_HALF: tl.constexpr = K_DIM // 2
    # products of 16-bit numbers are exact in fp32 (unless they are as small as 2**-126)
    EXACT: tl.constexpr = (
        KIND.primitive_bitwidth == 16 and cos_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    # the first sequences last: attention begins with them, and finds them in L2
    b = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    pid = tl.program_id(0)
    c = tl.arange(0, BLOCK_K)
    # appends compute, turning queries moves bytes: evenly mixed, they do so at the same time
    turn = tl.umulhi((2 * pid).to(tl.uint32), share.to(tl.uint32)).to(tl.int32)
    if turn == tl.umulhi((2 * pid + 2).to(tl.uint32), share.to(tl.uint32)).to(tl.int32):
        # heads of BLOCK_T tokens: of one token, all rows turn by the same angles
        TILES: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
        number = pid - turn
        one = tl.arange(0, BLOCK_T * BLOCK_H)
        first_token = number // TILES * BLOCK_T
        query = (first_token + one // BLOCK_H).to(tl.int64)
        head = (number % TILES * BLOCK_H + one % BLOCK_H).to(tl.int64)
        in_q = (query < seq) & (head < HEADS)
        asked = in_q[:, None] & (c < K_HALF)[None, :]
        angle = first_token + tl.arange(0, BLOCK_T * BLOCK_H if BLOCK_T > 1 else 1) // BLOCK_H
        q_cos0, q_sin0, q_cos1, q_sin1 = angles_of(
            cos_ptr + b * cos_stride_b, cos_stride_s, sin_ptr + b * sin_stride_b, sin_stride_s,
            angle, (angle < seq)[:, None] & (c < K_HALF)[None, :], c, K_HALF, FORM, ROTATED, PTX,
        )  # fmt: skip
        q_left, q_right = turned(
            q_ptr + b * q_stride_b + (head * q_stride_h + query * q_stride_s)[:, None], c, asked,
            q_weight_ptr, eps, q_cos0, q_sin0, q_cos1, q_sin1, K_HALF, FORM, ROTATED, NORMED,
            OFFSET, ROUND_FIRST, KIND, EXACT, PTX, ROUND_BF16,
        )  # fmt: skip
        q_out = q_out_ptr + ((b * HEADS + head) * seq + query)[:, None] * K_DIM + c[None, :]
        tl.store(q_out, q_left, mask=asked)
        tl.store(q_out + K_HALF, q_right, mask=asked)
    else:
        h = (turn % KV_HEADS).to(tl.int64)
        start = tl.load(start_ptr + b * start_stride)
        block_page, inside, first, token, whole = slots_of(
            start, turn // KV_HEADS, seq, pages, SINGLE, BLOCK_J
        )
        page = tl.load(table_ptr + b * table_stride + block_page, mask=inside, other=0)
        # on their way while keys are quantized
        v0, v1 = load_values(
            v_ptr + b * v_stride_b + h * v_stride_h, v_stride_s, token, inside, seq, V_DIM,
            BLOCK_J, BLOCK_V,
        )  # fmt: skip

        # keys of both halves at once: row r is slot r % BLOCK_J of half r // BLOCK_J
        r = tl.arange(0, 2 * BLOCK_J)
        row = r % BLOCK_J + r // BLOCK_J * HALF
        # keys are prepared for tokens past the table, too: attention reads them
        given = (token + row >= 0) & (token + row < seq)
        live = given[:, None] & (c < K_HALF)[None, :]
        cos0, sin0, cos1, sin1 = angles_of(
            cos_ptr + b * cos_stride_b, cos_stride_s, sin_ptr + b * sin_stride_b, sin_stride_s,
            token + row, live, c, K_HALF, FORM, ROTATED, PTX,
        )  # fmt: skip
        place = (token + row).to(tl.int64)
        left, right = turned(
            k_ptr + b * k_stride_b + h * k_stride_h + place[:, None] * k_stride_s, c, live,
            k_weight_ptr, eps, cos0, sin0, cos1, sin1, K_HALF, FORM, ROTATED, NORMED, OFFSET,
            ROUND_FIRST, KIND, EXACT, PTX, ROUND_BF16,
        )  # fmt: skip
        k_out = k_out_ptr + ((b * KV_HEADS + h) * seq + place)[:, None] * K_DIM + c[None, :]
        tl.store(k_out, left, mask=live)
        tl.store(k_out + K_HALF, right, mask=live)
        page_head = page.to(tl.int64) * KV_HEADS + h
        k_page = k_pages_ptr + page_head * (2 * HALF * (K_DIM * BITS // 8))
        v_page = v_pages_ptr + page_head * (V_DIM * 8 * BITS)
        words = words_ptr + page_head * (4 * HALF)
        put_turned_keys(
            left, right, given & inside, k_page, words, first + row, c, K_HALF, BITS, PTX
        )
        put_values(
            v0, v1, first, token, inside, whole, seq, v_page, words, V_DIM, BITS, BLOCK_J,
            BLOCK_V, PTX,
        )  # fmt: skip


@triton.jit
def put_turned_keys(
    left, right, new, k_page, words, slot, c, K_HALF: tl.constexpr, BITS: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Quantize keys, halves [T, BLOCK_K] of their channels, into `slot` [T] of a page."""
    TOP: tl.constexpr = 15.0 if BITS == 4 else 255.0
    left = widened(left, PTX)
    right = widened(right, PTX)
    in_c = (c < K_HALF)[None, :]
    low, high, broken = extent_of(nan_min(left, right), nan_max(left, right), in_c, PTX)
    low, inverse, word = grid_of(low, high, broken, TOP)
    target = k_page + slot[:, None] * (2 * K_HALF * BITS // 8) + c[None, :]
    live = new[:, None] & in_c
    if BITS == 4:
        tl.store(target, two_codes(left, right, low, inverse, low, inverse), mask=live)
    else:
        tl.store(target, codes_of(left, low, inverse, TOP).to(tl.uint8), mask=live)
        tl.store(target + K_HALF, codes_of(right, low, inverse, TOP).to(tl.uint8), mask=live)
    tl.store(words + slot, word, mask=new)


@triton.jit
def turned(
    rows, c, live, weight_ptr, eps, cos0, sin0, cos1, sin1,
    K_HALF: tl.constexpr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    PTX: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):  # fmt: skip
    """`prepared` of pieces_rotary.py in KIND, in fewer instructions where whole halves turn."""
    if FORM == HALVES and ROTATED == 2 * K_HALF and not NORMED and EXACT:
        x0 = widened(tl.load(rows + c[None, :], mask=live, other=0.0), PTX)
        x1 = widened(tl.load(rows + K_HALF + c[None, :], mask=live, other=0.0), PTX)
        # a fused sum is the same where the product is exact
        y0 = tl.fma(x1, -sin0, x0 * cos0)
        y1 = tl.fma(x0, sin1, x1 * cos1)
        y0 = rounded(y0, KIND, ROUND_BF16)
        y1 = rounded(y1, KIND, ROUND_BF16)
    else:
        y0, y1 = prepared(
            rows, c, live, weight_ptr, eps, cos0, sin0, cos1, sin1, K_HALF, FORM, ROTATED, NORMED,
            OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
        )  # fmt: skip
    return y0.to(KIND), y1.to(KIND)


@triton.jit
def angles_of(
    cos, cos_stride_s, sin, sin_stride_s, token, live, c,
    K_HALF: tl.constexpr,
    FORM: tl.constexpr,
    ROTATED: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of channels c and c + K_HALF, fp32 [T, C]; 1 and 0 for those that stay."""
    cos0, sin0, cos1, sin1 = 0.0, 0.0, 0.0, 0.0
    if FORM != NO_ROTARY:
        cos += token.to(tl.int64)[:, None] * cos_stride_s + c[None, :]
        sin += token.to(tl.int64)[:, None] * sin_stride_s + c[None, :]
        turns0 = live & (c < ROTATED)[None, :]
        turns1 = live & (c + K_HALF < ROTATED)[None, :]
        cos0 = widened(tl.load(cos, mask=turns0, other=1.0), PTX)
        sin0 = widened(tl.load(sin, mask=turns0, other=0.0), PTX)
        cos1 = widened(tl.load(cos + K_HALF, mask=turns1, other=1.0), PTX)
        sin1 = widened(tl.load(sin + K_HALF, mask=turns1, other=0.0), PTX)
    return cos0, sin0, cos1, sin1
