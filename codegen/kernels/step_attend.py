"""A decode step: turn q and k, quantize k and v into their page, attend over the pages, add up.

q [B, Hq, 1, Dk], k, v [B, H, 1, D] -> the pages at position length[b]; out [B, Hq, 1, Dv], or parts
of it. A block is a worker with a run of pages, of one or several (sequence, KV head):
step_schedule.py. It turns the queries of each, and puts the new token into the last page if that is
in its run (step_token.py), so that no block waits for another. Parts of a (sequence, KV head) are
added up by the worker that ends last, or in a launch of its own where there are many
(step_combine.py). The last worker that needs no length any more counts the tokens in `length`.
With FUSED = 0 step_append.py has turned q and put the token in. Twin: ir/kv_reference.py kv_decode.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from qoqc.codegen.kernels.kv_append import put_keys
from qoqc.codegen.kernels.pieces_rotary import prepared
from qoqc.codegen.kernels.step_pages import attend_pages, fetch_pages, hand_in
from qoqc.codegen.kernels.step_schedule import (
    LEAVES,
    all_pages,
    arrive,
    find_sequence,
    first_page,
    length_of,
    let_next_start,
    pages_at,
    pause_before,
    run_start,
    workers_for,
)
from qoqc.codegen.kernels.step_token import angles_of, as_operands, put_value, value_bytes


@triton.jit
def load_turned(
    q_rows, q_sum, in_row, K_HALF: tl.constexpr, OPERAND: tl.constexpr, BLOCK_C: tl.constexpr
):
    """What `as_operands` gives, but its last, from step_append.py's queries at q_rows [BLOCK_R]."""
    c = tl.arange(0, BLOCK_C)[:, None]
    in_q = (c < K_HALF) & in_row[None, :]
    q0 = tl.load(q_rows[None, :] + c, mask=in_q, other=0.0).to(OPERAND)
    q1 = tl.load(q_rows[None, :] + K_HALF + c, mask=in_q, other=0.0).to(OPERAND)
    return q0, q1, tl.load(q_sum, mask=in_row, other=0.0)


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "k_stride_b", "k_stride_h", "v_stride_b", "v_stride_h",
        "cos_stride", "sin_stride", "table_stride", "length_stride", "mask_stride", "mask_len",
        "batch", "pages", "meet", "window",
    ]
)  # fmt: skip
def step_attend(
    q_ptr, q_stride_b, q_stride_h,
    q_sum_ptr, q_unit_ptr,  # of turned queries, fp32 [B, Hq] and [B, Hkv]: step_append.py
    k_ptr, k_stride_b, k_stride_h,
    v_ptr, v_stride_b, v_stride_h,
    q_weight_ptr, k_weight_ptr,
    cos_ptr, cos_stride, sin_ptr, sin_stride,
    k_pages_ptr, v_pages_ptr, words_ptr,
    table_ptr, table_stride,
    length_ptr, length_stride,  # without the newest token
    mask_ptr, mask_stride, mask_len,
    sinks_ptr,
    out_ptr,  # [B, Hq, Dv]
    part_ptr,  # fp32 [grid, 2, group, Dv], where step_combine.py says
    stat_ptr,  # fp32 [grid, 2, group, 2]
    counter_ptr,  # int32 zeros, and left as zeros: 1 + LEAVES, and [B, Hkv], used if `meet`
    eps, scale, softcap,
    batch, pages,
    meet,  # bool: the worker that ends last of a (sequence, KV head) adds up its parts
    window,  # tokens that the newest one sees, itself one of them: if HAS_WINDOW
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
    HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    OPERAND: tl.constexpr,
    WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    PTX: tl.constexpr,
    TINY_CODES: tl.constexpr,
    TINY_VALUES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    FUSED: tl.constexpr,
    FETCH: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_R: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A worker's run of pages, a (sequence, KV head) at a time."""
    TOKENS: tl.constexpr = 64
    GROUP: tl.constexpr = HEADS // KV_HEADS
    K_HALF: tl.constexpr = K_DIM // 2
    K_BYTES: tl.constexpr = K_DIM * BITS // 8 * TOKENS  # of a page
    V_BYTES: tl.constexpr = V_DIM * BITS // 8 * TOKENS
    worker = tl.program_id(0)
    capacity = pages * TOKENS
    # until the wait the kernel before may be at work, so only tables and lengths are read: kernels
    # that change them let nothing start before they have (let_next_start)
    total_pages, each = all_pages(
        length_ptr, length_stride, batch, capacity, window, KV_HEADS, HAS_WINDOW, False
    )
    workers = workers_for(total_pages, each, batch * KV_HEADS, tl.num_programs(0), SHORT)
    run = total_pages
    run_end = total_pages
    if worker < workers:
        run = run_start(worker, total_pages, workers)
        run_end = run_start(worker + 1, total_pages, workers)
    pause = pause_before(each)
    if each > 0:
        sequence = run // (each * KV_HEADS)
        before = sequence * (each * KV_HEADS)
    else:
        sequence, before = find_sequence(
            run, length_ptr, length_stride, batch, capacity, window, KV_HEADS, HAS_WINDOW
        )
    length = length_of(length_ptr, length_stride, sequence, batch, capacity, False)
    used = pages_at(length, window, HAS_WINDOW)
    # from the first page of the run on, which is behind the pause
    run = tl.maximum(run, before + (run - before) // (used + pause) * (used + pause) + pause)
    if FETCH:
        # asking for a page is no reading: where it is written after all, L2 has what was written
        ahead = table_ptr + sequence.to(tl.int64) * table_stride
        if HAS_WINDOW:
            ahead += first_page(length, window)
        h = (run - before) // (used + pause)
        first = (run - before) % (used + pause) - pause
        stop = tl.where(length >= 0, tl.minimum(used, first + (run_end - run)), 0)
        fetch_pages(
            ahead, first, stop, h, k_pages_ptr, v_pages_ptr, words_ptr,
            FETCH, KV_HEADS, K_BYTES, V_BYTES,
        )  # fmt: skip
    if DEPENDENT:
        gdc_wait()
    # a worker counts itself in when it has read the last length of its run: mostly the first
    arrives = run_end <= before + (used + pause) * KV_HEADS + pause
    ticket = arrive(counter_ptr, worker, arrives)
    place = run
    while place < run_end:
        h = (place - before) // (used + pause)
        first = (place - before) % (used + pause) - pause
        end = tl.minimum(used, first + (run_end - place))
        is_last = end == used
        b = sequence.to(tl.int64)
        fits = length >= 0
        stop = tl.where(fits, end, first)
        table = table_ptr + b * table_stride
        mask_row = mask_ptr + b * mask_stride
        cached = length + 1
        masked = mask_len
        oldest = 0
        if HAS_WINDOW:
            # from here on pages and tokens are counted from the first page that is read
            skipped = first_page(length, window)
            table += skipped
            mask_row += skipped * TOKENS
            cached -= skipped * TOKENS
            masked -= skipped * TOKENS
            oldest = cached - window
        row = tl.arange(0, BLOCK_R)
        in_row = row < GROUP
        head = h * GROUP + row
        if FUSED:
            # memory is asked for all that this takes before any of it is used
            last_head = tl.load(table + used - 1, mask=fits, other=0).to(tl.int64) * KV_HEADS + h
            cos0, sin0, cos1, sin1 = angles_of(
                cos_ptr + b * cos_stride, sin_ptr + b * sin_stride, K_HALF, FORM, ROTATED, BLOCK_C
            )
            c = tl.arange(0, BLOCK_C)
            d = tl.arange(0, BLOCK_V)[None, :]
            one = tl.arange(0, 1)
            group = tl.arange(0, GROUP_R)[:, None]
            in_k = (c < K_HALF)[None, :]
            q0, q1 = prepared(
                q_ptr + b * q_stride_b + (h * GROUP + group) * q_stride_h, c,
                (group < GROUP) & in_k, q_weight_ptr, eps, cos0, sin0, cos1, sin1,
                K_HALF, FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
            )  # fmt: skip
            appends = is_last & fits
            k0, k1 = prepared(
                k_ptr + b * k_stride_b + h * k_stride_h + one[:, None], c, in_k & appends,
                k_weight_ptr, eps, cos0, sin0, cos1, sin1,
                K_HALF, FORM, ROTATED, NORMED, OFFSET, ROUND_FIRST, KIND, ROUND_BF16,
            )  # fmt: skip
            v_row = v_ptr + b * v_stride_b + h * v_stride_h + d
            v = tl.load(v_row, mask=(d < V_DIM) & appends, other=0.0).to(tl.float32)
            slot = length % TOKENS
            target, old = value_bytes(
                v_pages_ptr + last_head * V_BYTES, slot, appends, V_DIM, BITS, BLOCK_V
            )
            if appends:
                words = words_ptr + last_head * (2 * TOKENS)
                k_page = k_pages_ptr + last_head * K_BYTES
                put_keys(k0, k1, in_k, one == 0, k_page, words, slot + one, c, K_HALF, BITS)
                put_value(v, old, target, words, slot, True, V_DIM, BITS, BLOCK_V)
                # what one thread has written another reads
                tl.debug_barrier()
            q0, q1, q_sum, q_unit = as_operands(
                q0, q1, KIND, TINY_CODES, OPERAND, BLOCK_C, BLOCK_R, GROUP_R
            )
        else:
            q_rows = q_ptr + b * q_stride_b + head * q_stride_h
            q_sums = q_sum_ptr + b * HEADS + head
            q0, q1, q_sum = load_turned(q_rows, q_sums, in_row, K_HALF, OPERAND, BLOCK_C)
            q_unit = 1.0
            if TINY_CODES:
                q_unit = tl.load(q_unit_ptr + b * KV_HEADS + h)
        if arrives:
            # only now, when its answer is there
            let_next_start(counter_ptr, ticket, worker, length_ptr, length_stride, batch, DEPENDENT)
            arrives = False
        sums, total, peak = attend_pages(
            q0, q1, q_sum, q_unit, head, in_row, h, first, stop, cached, oldest, is_last,
            table, k_pages_ptr, v_pages_ptr, words_ptr, mask_row, masked,
            sinks_ptr, scale, softcap,
            KV_HEADS, K_DIM, V_DIM, BITS, HAS_MASK, HAS_SINKS, HAS_SOFTCAP, HAS_WINDOW,
            OPERAND, WEIGHT, PTX, TINY_CODES, TINY_VALUES, BLOCK_C, BLOCK_V, BLOCK_R,
        )  # fmt: skip
        begin = place - first
        place += end - first + pause
        if FETCH:
            # of the next head of the sequence, while this one's sums are handed in
            stop = tl.where(fits & (h + 1 < KV_HEADS), tl.minimum(used, run_end - place), 0)
            fetch_pages(
                table, 0, stop, h + 1, k_pages_ptr, v_pages_ptr, words_ptr,
                FETCH, KV_HEADS, K_BYTES, V_BYTES,
            )  # fmt: skip
        hand_in(
            sums, total, peak, worker, begin + first != run, begin, used, pause,
            (first == 0) & is_last, total_pages, workers, fits,
            out_ptr + (b * HEADS + h * GROUP) * V_DIM, part_ptr, stat_ptr,
            counter_ptr + 1 + LEAVES + sequence * KV_HEADS + h, meet,
            GROUP, V_DIM, KIND, ROUND_BF16, BLOCK_V, BLOCK_R, GROUP_R, AT_ONCE,
        )  # fmt: skip
        if (place == before + (used + pause) * KV_HEADS + pause) & (place < run_end):
            before = place - pause
            sequence += 1
            length = length_of(length_ptr, length_stride, sequence, batch, capacity, False)
            used = pages_at(length, window, HAS_WINDOW)
            arrives = run_end <= before + (used + pause) * KV_HEADS + pause
            ticket = arrive(counter_ptr, worker, arrives)
    if arrives:
        # a worker without pages
        let_next_start(counter_ptr, ticket, worker, length_ptr, length_stride, batch, DEPENDENT)
