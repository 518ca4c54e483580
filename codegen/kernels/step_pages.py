"""What a worker of a decode step does with the pages of one (sequence, KV head).

`attend_pages` takes the queries through a run of pages, `hand_in` writes the output, or a part and
adds up all where it is the last to have one. step_attend.py says which pages, and for whom.

The dot products are those of attention_decode.py: [tokens, channels] x [channels, query heads].
"""

from __future__ import annotations

import triton
import triton.language as tl

from qoqc.codegen.kernels.pieces_kv import (
    LOG2E,
    TINY,
    TINY_STEP,
    capped,
    level_of,
    load_codes,
    load_tiny,
    mma,
    power_of_two,
    split_word,
    tiny_order,
)
from qoqc.codegen.kernels.step_combine import combine_parts, part_of, quotient
from qoqc.codegen.kernels.step_schedule import owner_of, run_start

SLACK = tl.constexpr(4)
"""log2 by which scores may exceed `peak` before sums are scaled anew: rarely, after a start."""

SHIFT = tl.constexpr(15 + 14 - 4)
"""A weight is p * scale * 2 ** (SHIFT - level) <= 2 ** 14: with p <= 2 ** SLACK fp16 holds it."""


@triton.jit
def fetch(pointers, wanted, BYTES: tl.constexpr):
    """Ask for about BYTES at each of 32 pointers, if `wanted`, to be brought into L2: since sm_90.

    A hint, by the lanes of the first warp.
    """
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.ne.b32 p, $2, 0;
        setp.lt.and.u32 p, thread, 32, p;
        @p cp.async.bulk.prefetch.L2.global [$1], $3;
        mov.b32 $0, 0;
        }
        """,
        "=r,l,r,n",
        [pointers.to(tl.int64) & -16, wanted.to(tl.int32), BYTES],  # other addresses are an error
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def fetch_pages(
    table, first, stop, h, k_pages_ptr, v_pages_ptr, words_ptr,
    COUNT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
):  # fmt: skip
    """Ask for what KV head `h` has in COUNT pages of a sequence from `first` on, before `stop`."""
    i = tl.arange(0, 32)
    wanted = (i < COUNT) & (first + i < stop)
    page = tl.load(table + first + i, mask=wanted, other=0).to(tl.int64) * KV_HEADS + h
    fetch(k_pages_ptr + page * K_BYTES, wanted, K_BYTES)
    fetch(words_ptr + page * 128, wanted, 512)
    fetch(v_pages_ptr + page * V_BYTES, wanted, V_BYTES)


@triton.jit
def centring(w0, w1, HALF: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr):
    """What centring tiny codes takes off their weighted sums, fp32 [BLOCK_V, BLOCK_R]: equal rows.

    For one page, by a product of 16 rows: cheaper than a subtraction for each two codes. Left to
    the end it would be the small difference of two large sums.
    """
    low = tl.full((16, HALF), -8.0 * 2.0**-24, tl.float16)
    high = tl.full((16, HALF), -8.0 * 2.0**-20, tl.float16)
    rows = mma(high, w1, mma(low, w0, tl.zeros((16, BLOCK_R), tl.float32)))
    rows = tl.broadcast_to(rows[None, :, :], (BLOCK_V // 16, 16, BLOCK_R))
    return tl.reshape(rows, (BLOCK_V, BLOCK_R))


@triton.jit
def attend_pages(
    q0, q1, q_sum, q_unit,  # two [BLOCK_C, BLOCK_R] OPERAND; fp32 [BLOCK_R]; fp32
    head, in_row,  # [BLOCK_R]: query heads, and which there are
    h,
    first, stop,  # pages, counted from the table's first
    cached,  # tokens from the table's first page on, the new one among them
    oldest,  # the first of these that is seen, if HAS_WINDOW; may be negative
    is_last,  # bool: has the last page of the sequence
    table,
    k_pages_ptr, v_pages_ptr, words_ptr,
    mask_row, mask_len,
    sinks_ptr,
    scale, softcap,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OPERAND: tl.constexpr,
    WEIGHT: tl.constexpr,
    PTX: tl.constexpr,
    TINY_CODES: tl.constexpr,
    TINY_VALUES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of KV head `h` the sum of weighted values fp32 [BLOCK_V, BLOCK_R], of weights, their peak."""
    HALF: tl.constexpr = 32
    K_HALF: tl.constexpr = K_DIM // 2
    K_BYTES: tl.constexpr = K_DIM * BITS // 8
    V_BYTES: tl.constexpr = 8 * BITS
    CENTRE: tl.constexpr = 8.0 if BITS == 4 else 128.0
    K_BIAS: tl.constexpr = 0.0 if TINY_CODES else -CENTRE  # by so much codes of K are loaded larger
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_V)
    j = tl.arange(0, HALF)
    token = tiny_order(j) if TINY_VALUES else j
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    # summed over tokens at the end only: until then each thread has its own
    totals = tl.zeros((HALF, BLOCK_R), tl.float32)  # of p
    offsets = tl.zeros((HALF, BLOCK_R), tl.float32)  # of p * middle
    # weights of dot products are p * value scale * 2 ** (SHIFT - level)
    acc = tl.zeros((BLOCK_V, BLOCK_R), tl.float32)  # sum of weights * centred codes
    level = tl.full((), 0, tl.int32)
    if HAS_SINKS:
        # a score without a value: it only takes weight, once
        sink = tl.load(sinks_ptr + head, mask=in_row & is_last, other=float("-inf"))
        peak = sink.to(tl.float32) * LOG2E
        totals += tl.where((j == 0)[:, None] & (peak > float("-inf"))[None, :], 1.0, 0.0)

    in_k_page = (c < K_HALF)[None, :]
    in_v_page = (d < V_DIM)[:, None]
    k_tile = token[:, None] * K_BYTES + c[None, :]  # [HALF, BLOCK_C] bytes
    v_tile = d[:, None] * V_BYTES + j[None, :]  # [BLOCK_V, HALF] bytes
    log2_scale = scale * LOG2E
    log2_sum = (q_sum * log2_scale)[None, :]
    code_scale = log2_scale * q_unit
    for i in range(first, stop):
        page_head = tl.load(table + i).to(tl.int64) * KV_HEADS + h
        t0 = i * (2 * HALF) + token
        t1 = t0 + HALF
        # words past the end are stale; read as zeros they cannot spread a NaN
        seen0 = t0 < cached
        seen1 = t1 < cached
        if HAS_WINDOW:
            seen0 &= t0 >= oldest
            seen1 &= t1 >= oldest
        page_words = words_ptr + page_head * (4 * HALF) + token
        k_word0 = tl.load(page_words, mask=seen0, other=0)
        k_word1 = tl.load(page_words + HALF, mask=seen1, other=0)
        v_word0 = tl.load(page_words + 2 * HALF, mask=seen0, other=0)
        v_word1 = tl.load(page_words + 3 * HALF, mask=seen1, other=0)
        if HAS_MASK:
            seen0 &= tl.load(mask_row + t0, mask=seen0 & (t0 < mask_len), other=0) != 0
            seen1 &= tl.load(mask_row + t1, mask=seen1 & (t1 < mask_len), other=0) != 0
            k_word0 = tl.where(seen0, k_word0, 0)
            k_word1 = tl.where(seen1, k_word1, 0)
            v_word0 = tl.where(seen0, v_word0, 0)
            v_word1 = tl.where(seen1, v_word1, 0)
        k_scale0, k_middle0 = split_word(k_word0, -K_BIAS)
        k_scale1, k_middle1 = split_word(k_word1, -K_BIAS)
        v_scale0, v_middle0 = split_word(v_word0, CENTRE)
        v_scale1, v_middle1 = split_word(v_word1, CENTRE)
        k_page = k_pages_ptr + page_head * (2 * HALF * K_BYTES)
        k_half = k_page + HALF * K_BYTES
        if TINY_CODES:
            k00, k01 = load_tiny(k_page, k_tile, in_k_page)
            k10, k11 = load_tiny(k_half, k_tile, in_k_page)
        else:
            k00, k01 = load_codes(k_page, k_tile, K_HALF, in_k_page, BITS, OPERAND, PTX)
            k10, k11 = load_codes(k_half, k_tile, K_HALF, in_k_page, BITS, OPERAND, PTX)
        zeros = tl.zeros((HALF, BLOCK_R), tl.float32)
        s0 = mma(k01, q1, mma(k00, q0, zeros))
        s1 = mma(k11, q1, mma(k10, q0, zeros))
        if HAS_SOFTCAP:
            s0 = s0 * (k_scale0 * q_unit)[:, None] + q_sum[None, :] * k_middle0[:, None]
            s1 = s1 * (k_scale1 * q_unit)[:, None] + q_sum[None, :] * k_middle1[:, None]
            s0 *= scale
            s1 *= scale
            s0 = capped(s0, softcap, HAS_SOFTCAP) * LOG2E
            s1 = capped(s1, softcap, HAS_SOFTCAP) * LOG2E
        else:
            s0 = tl.fma(s0, (k_scale0 * code_scale)[:, None], log2_sum * k_middle0[:, None])
            s1 = tl.fma(s1, (k_scale1 * code_scale)[:, None], log2_sum * k_middle1[:, None])
        s0 = tl.where(seen0[:, None], s0, float("-inf"))
        s1 = tl.where(seen1[:, None], s1, float("-inf"))

        highest = tl.maximum(s0, s1)
        new_level = level_of(v_word0, v_word1, level)
        exceeds = (highest > peak[None, :] + SLACK).to(tl.int32)
        if (tl.max(exceeds) != 0) | (new_level > level):
            new_peak = tl.maximum(peak, tl.max(highest, 0))
            # a row that has seen nothing has no peak to subtract: -inf - -inf would be NaN
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            shrink = tl.exp2(peak - base)
            totals *= shrink[None, :]
            offsets *= shrink[None, :]
            acc *= (shrink * power_of_two(level - new_level))[None, :]
            peak = new_peak
            level = new_level
        base = tl.where(peak == float("-inf"), 0.0, peak)
        p0 = tl.exp2(s0 - base[None, :])
        p1 = tl.exp2(s1 - base[None, :])
        totals += p0 + p1
        offsets += tl.fma(p0, v_middle0[:, None], p1 * v_middle1[:, None])
        gain = power_of_two(-(level - SHIFT))
        w0 = (p0 * (v_scale0 * gain)[:, None]).to(WEIGHT)
        if TINY_VALUES:
            gain /= TINY_STEP
        w1 = (p1 * (v_scale1 * gain)[:, None]).to(WEIGHT)
        v_page = v_pages_ptr + page_head * (V_DIM * V_BYTES)
        if TINY_VALUES:
            v0, v1 = load_tiny(v_page, v_tile, in_v_page)
            acc += centring(w0, w1, HALF, BLOCK_V, BLOCK_R)
        else:
            v0, v1 = load_codes(v_page, v_tile, HALF, in_v_page, BITS, WEIGHT, PTX)
        acc = mma(v0, w0, mma(v1, w1, acc))

    total = tl.sum(totals, 0)
    offset = tl.sum(offsets, 0)
    if TINY_VALUES:
        level += TINY
    sums = tl.fma(acc, power_of_two(level - SHIFT), offset[None, :])
    return sums, total, peak


@triton.jit
def hand_in(
    sums, total, peak,
    worker, at_end,  # at_end: bool, another (sequence, KV head) came before in the worker's run
    begin, used,  # where the pages of this one begin in the row of all, and how many they are
    pause,  # empty places before them
    whole,  # bool: they are all this worker's
    total_pages, workers,
    fits,
    out,  # [group, Dv], those of this (sequence, KV head)
    part_ptr, stat_ptr,
    counter,
    meet,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_R: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write the output, or a part: the last one to do so adds up all if they are to `meet`."""
    row = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_V)
    in_row = row < GROUP
    in_out = in_row[None, :] & (d < V_DIM)[:, None]
    row_out = row[None, :] * V_DIM + d[:, None]
    if whole:
        result = quotient(sums, total[None, :], fits, ROUND_BF16)
        tl.store(out + row_out, result.to(KIND), mask=in_out)
    else:
        vector = part_of(worker, at_end).to(tl.int64) * GROUP
        tl.store(part_ptr + vector * V_DIM + row_out, sums, mask=in_out)
        tl.store(stat_ptr + (vector + row) * 2, peak, mask=in_row)
        tl.store(stat_ptr + (vector + row) * 2 + 1, total, mask=in_row)
        if meet:
            first_worker = owner_of(begin, total_pages, workers)
            parts = owner_of(begin + used - 1, total_pages, workers) - first_worker + 1
            # the parts of all threads must be there before one thread says so
            tl.debug_barrier()
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == parts - 1:
                tl.store(counter, 0)
                inside = run_start(first_worker, total_pages, workers) < begin - pause
                combine_parts(
                    part_ptr, stat_ptr, out, first_worker, inside, parts, 0, 0, fits,
                    GROUP, V_DIM, KIND, ROUND_BF16, GROUP_R, BLOCK_V, AT_ONCE,
                )  # fmt: skip
