"""The newest token of each sequence: turn q and k, quantize k and v, put them into their page.

The first of two launches, for tiles of step_attend.py with FUSED = 0.
q [B, Hq, 1, Dk] -> q_out [B, Hq, Dk]; k, v [B, H, 1, D] -> the pages at position length[b]; the
kernel that adds up parts counts it. Definitions: ir/rotary.py, quant/kv.py. A key, a value and
their queries are three blocks each of one (sequence, KV head): one after the other they would wait
for memory three times.

For TINY_CODES (pieces_kv.py) q_out is fp16: a power of two times the queries, which is the same for
those of a KV head and which q_unit [B, Hkv] undoes, less TINY_STEP in the second half of channels;
in each half channels stand in `tiny_order`. q_sum [B, Hq] are sums over the channels of q itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.kernels.kv_append import put_keys
from qoqc.codegen.kernels.pieces_kv import TINY, TINY_STEP, octave_of, power_of_two, tiny_order
from qoqc.codegen.kernels.pieces_rotary import NO_ROTARY, prepared
from qoqc.codegen.kernels.step_token import put_value, value_bytes


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
    q_out_ptr, q_sum_ptr, q_unit_ptr,
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
    TINY_CODES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP_R: tl.constexpr,
):  # fmt: skip
    """Of (sequence, KV head) `program_id(0)` the queries, the key or the value: `program_id(1)`.

    A token without room is not written.
    """
    HALF: tl.constexpr = 32
    GROUP: tl.constexpr = HEADS // KV_HEADS
    K_HALF: tl.constexpr = K_DIM // 2
    if DEPENDENT:
        gdc_wait()
        # after the wait: what comes next may then rely on all that came before this kernel
        gdc_launch_dependents()
    b = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    h = tl.program_id(0) % KV_HEADS
    part = tl.program_id(1)
    place = tl.arange(0, BLOCK_C)
    c = place
    if TINY_CODES:
        c = tl.where(part == 0, tiny_order(place), place)
    in_c = (place < K_HALF)[None, :]
    cos0, sin0, cos1, sin1 = 0.0, 0.0, 0.0, 0.0
    if FORM != NO_ROTARY:
        turns0 = in_c & (c < ROTATED)[None, :] & (part < 2)
        turns1 = in_c & (c + K_HALF < ROTATED)[None, :] & (part < 2)
        cos = cos_ptr + b * cos_stride + c[None, :]
        sin = sin_ptr + b * sin_stride + c[None, :]
        cos0 = tl.load(cos, mask=turns0, other=1.0).to(tl.float32)
        sin0 = tl.load(sin, mask=turns0, other=0.0).to(tl.float32)
        cos1 = tl.load(cos + K_HALF, mask=turns1, other=1.0).to(tl.float32)
        sin1 = tl.load(sin + K_HALF, mask=turns1, other=0.0).to(tl.float32)
    if part == 0:
        row = tl.arange(0, GROUP_R)
        head = h * GROUP + row[:, None]
        in_q = (row < GROUP)[:, None] & in_c
        q0, q1 = prepared(
            q_ptr + b * q_stride_b + head * q_stride_h, c, in_q, q_weight_ptr, eps,
            cos0, sin0, cos1, sin1,
            K_HALF, FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
        )  # fmt: skip
        q0 = q0.to(KIND)
        q1 = q1.to(KIND)
        heads = b * HEADS + head
        q_sum = tl.sum(q0.to(tl.float32) + q1.to(tl.float32), 1)[:, None]
        tl.store(q_sum_ptr + heads, q_sum, mask=(row < GROUP)[:, None])
        q_out = q_out_ptr + heads * K_DIM + place[None, :]
        if TINY_CODES:
            # a power of two makes them fit into fp16, whatever the range of bf16
            size = tl.maximum(tl.abs(q0.to(tl.float32)), tl.abs(q1.to(tl.float32)))
            octave = octave_of(tl.max(tl.max(size, 1), 0)) - 14
            tl.store(q_unit_ptr + tl.program_id(0), power_of_two(octave + TINY))
            shrink = power_of_two(-octave)
            q0 = (q0.to(tl.float32) * shrink).to(tl.float16)
            q1 = (q1.to(tl.float32) * (shrink / TINY_STEP)).to(tl.float16)
        tl.store(q_out, q0, mask=in_q)
        tl.store(q_out + K_HALF, q1, mask=in_q)
    else:
        length = tl.load(length_ptr + b * length_stride)
        fits = (length >= 0) & (length < pages * (2 * HALF))
        position = tl.where(fits, length, 0).to(tl.int32)
        page = tl.load(table_ptr + b * table_stride + position // (2 * HALF), mask=fits, other=0)
        page_head = page.to(tl.int64) * KV_HEADS + h
        words = words_ptr + page_head * (4 * HALF)
        slot = position % (2 * HALF)
        if part == 1:
            k0, k1 = prepared(
                k_ptr + b * k_stride_b + h * k_stride_h, c, in_c, k_weight_ptr, eps,
                cos0, sin0, cos1, sin1,
                K_HALF, FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
            )  # fmt: skip
            slots = slot + tl.arange(0, 1)
            k_page = k_pages_ptr + page_head * (2 * HALF * (K_DIM * BITS // 8))
            put_keys(
                k0, k1, in_c & fits, fits & (slots >= 0), k_page, words, slots, c, K_HALF, BITS
            )
        else:
            v_page = v_pages_ptr + page_head * (V_DIM * 8 * BITS)
            d = tl.arange(0, BLOCK_V)[None, :]
            v_row = v_ptr + b * v_stride_b + h * v_stride_h + d
            v = tl.load(v_row, mask=d < V_DIM, other=0.0).to(tl.float32)
            target, old = value_bytes(v_page, slot, fits, V_DIM, BITS, BLOCK_V)
            put_value(v, old, target, words, slot, fits, V_DIM, BITS, BLOCK_V)
