"""Attention of the newest token of each sequence over the pages of the KV cache: a decode step.

q [B, Hq, Dk] as step_append.py leaves it, its token in the cache already -> out [B, Hq, Dv], or
parts of it.
A block is a worker with a run of pages, of one or several (sequence, KV head): step_schedule.py.
step_combine.py adds up the parts of a (sequence, KV head): in the worker that ends last, or in a
launch of its own where there are many. Twin: ir/kv_reference.py kv_decode.

The dot products are those of attention_decode.py: [tokens, channels] x [channels, query heads].
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
from qoqc.codegen.kernels.step_schedule import (
    LEAVES,
    all_pages,
    arrive,
    comes_last,
    count_tokens,
    find_sequence,
    owner_of,
    pages_of,
    run_start,
    workers_for,
)

SLACK = tl.constexpr(4)
"""log2 by which scores may exceed `peak` before sums are scaled anew: rarely, after a start."""

SHIFT = tl.constexpr(15 + 14 - 4)
"""A weight is p * scale * 2 ** (SHIFT - level) <= 2 ** 14: with p <= 2 ** SLACK fp16 holds it."""


@triton.jit(
    do_not_specialize=[
        "table_stride", "length_stride", "mask_stride", "mask_len", "batch", "pages", "meet",
    ]
)  # fmt: skip
def step_attend(
    q_ptr, q_sum_ptr, q_unit_ptr,  # [B, Hq, Dk], fp32 [B, Hq] and [B, Hkv]: step_append.py
    k_pages_ptr, v_pages_ptr, words_ptr,
    table_ptr, table_stride,
    length_ptr, length_stride,  # without the newest token, which one block counts in there
    cached_ptr,  # int32 [B], what was in there before: step_append.py
    mask_ptr, mask_stride, mask_len,
    sinks_ptr,
    out_ptr,  # [B, Hq, Dv]
    part_ptr,  # fp32 [grid, 2, group, Dv], where step_combine.py says
    stat_ptr,  # fp32 [grid, 2, group, 2]
    counter_ptr,  # int32 zeros, and left as zeros: 1 + LEAVES, and [B, Hkv]; used if `meet`
    scale, softcap,
    batch, pages,
    meet,  # bool: the worker that ends last of a (sequence, KV head) adds up its parts
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    PTX: tl.constexpr,
    TINY_CODES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_R: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A worker's run of pages, a (sequence, KV head) at a time."""
    HALF: tl.constexpr = 32
    GROUP: tl.constexpr = HEADS // KV_HEADS
    K_HALF: tl.constexpr = K_DIM // 2
    K_BYTES: tl.constexpr = K_DIM * BITS // 8
    V_BYTES: tl.constexpr = 8 * BITS
    CENTRE: tl.constexpr = 8.0 if BITS == 4 else 128.0
    K_BIAS: tl.constexpr = 0.0 if TINY_CODES else -CENTRE  # by so much codes of K are loaded larger
    worker = tl.program_id(0)
    capacity = pages * (2 * HALF)
    total_pages, each = all_pages(length_ptr, length_stride, batch, capacity, KV_HEADS)
    workers = workers_for(total_pages, each, batch * KV_HEADS, tl.num_programs(0), SHORT)
    run = total_pages
    run_end = total_pages
    if worker < workers:
        run = run_start(worker, total_pages, workers)
        run_end = run_start(worker + 1, total_pages, workers)
    used = each
    if each > 0:
        sequence = run // (each * KV_HEADS)
        before = sequence * (each * KV_HEADS)
    else:
        sequence, before = find_sequence(run, length_ptr, length_stride, batch, capacity, KV_HEADS)
        used = pages_of(length_ptr, length_stride, sequence, batch, capacity)
    if DEPENDENT:
        # all so far while the kernel before, which appends, was at work: it leaves `length` alone
        gdc_wait()
        gdc_launch_dependents()
    ticket = arrive(counter_ptr, worker)
    place = run
    while place < run_end:
        h = (place - before) // used
        first = (place - before) % used
        end = tl.minimum(used, first + (run_end - place))
        is_last = end == used
        b = sequence.to(tl.int64)
        length = tl.load(cached_ptr + b)
        fits = length >= 0
        cached = length + 1
        stop = tl.where(fits, end, first)
        table = table_ptr + b * table_stride

        row = tl.arange(0, BLOCK_R)
        head = h * GROUP + row
        in_row = row < GROUP
        c = tl.arange(0, BLOCK_C)
        d = tl.arange(0, BLOCK_V)
        j = tl.arange(0, HALF)
        token = tiny_order(j) if TINY_CODES else j
        in_q = (c < K_HALF)[:, None] & in_row[None, :]
        q_rows = q_ptr + (b * HEADS + head)[None, :] * K_DIM + c[:, None]
        q0 = tl.load(q_rows, mask=in_q, other=0.0).to(OPERAND)  # [BLOCK_C, BLOCK_R]
        q1 = tl.load(q_rows + K_HALF, mask=in_q, other=0.0).to(OPERAND)
        q_sum = tl.load(q_sum_ptr + b * HEADS + head, mask=in_row, other=0.0)
        q_unit = 1.0
        if TINY_CODES:
            q_unit = tl.load(q_unit_ptr + b * KV_HEADS + h)
        mask_row = mask_ptr + b * mask_stride

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
                k00, k01 = load_tiny(k_page, k_tile, in_k_page, False)
                k10, k11 = load_tiny(k_half, k_tile, in_k_page, False)
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
            if TINY_CODES:
                gain /= TINY_STEP
            w1 = (p1 * (v_scale1 * gain)[:, None]).to(WEIGHT)
            v_page = v_pages_ptr + page_head * (V_DIM * V_BYTES)
            if TINY_CODES:
                v0, v1 = load_tiny(v_page, v_tile, in_v_page, True)
            else:
                v0, v1 = load_codes(v_page, v_tile, HALF, in_v_page, BITS, WEIGHT, PTX)
            acc = mma(v1, w1, mma(v0, w0, acc))

        total = tl.sum(totals, 0)
        offset = tl.sum(offsets, 0)
        if TINY_CODES:
            level += TINY
        sums = tl.fma(acc, power_of_two(level - SHIFT), offset[None, :])
        in_out = in_row[None, :] & in_v_page
        row_out = row[None, :] * V_DIM + d[:, None]
        out = out_ptr + (b * HEADS + h * GROUP) * V_DIM
        if (first == 0) & is_last:
            result = quotient(sums, total[None, :], fits, ROUND_BF16)
            tl.store(out + row_out, result.to(KIND), mask=in_out)
        else:
            vector = part_of(worker, place != run).to(tl.int64) * GROUP
            tl.store(part_ptr + vector * V_DIM + row_out, sums, mask=in_out)
            tl.store(stat_ptr + (vector + row) * 2, peak, mask=in_row)
            tl.store(stat_ptr + (vector + row) * 2 + 1, total, mask=in_row)
            if meet:
                begin = before + h * used
                first_worker = owner_of(begin, total_pages, workers)
                parts = owner_of(begin + used - 1, total_pages, workers) - first_worker + 1
                counter = counter_ptr + 1 + LEAVES + sequence * KV_HEADS + h
                # the parts of all threads must be there before one thread says so
                tl.debug_barrier()
                arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
                tl.debug_barrier()
                if arrived == parts - 1:
                    tl.store(counter, 0)
                    inside = run_start(first_worker, total_pages, workers) != begin
                    combine_parts(
                        part_ptr, stat_ptr, out, first_worker, inside, parts, 0, 0, fits,
                        GROUP, V_DIM, KIND, ROUND_BF16, GROUP_R, BLOCK_V, AT_ONCE,
                    )  # fmt: skip
        place += end - first
        if place == before + used * KV_HEADS:
            before = place
            sequence += 1
            used = pages_of(cached_ptr, 1, sequence, batch, capacity)
    if comes_last(counter_ptr, ticket, worker, tl.num_programs(0)) != 0:
        count_tokens(length_ptr, length_stride, batch)
