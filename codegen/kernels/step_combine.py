"""Add up the parts of a decode step (step_attend.py) in a launch of its own.

part fp32 [workers, 2, group, Dv], stat fp32 [workers, 2, group, 2] (peak in log2, total) -> out [B,
Hq, Dv]; of the two, the first is where a worker's run begins, the second where it ends. For few
sequences of many parts: there one block per sequence and head would add up for longer than a launch
takes. It finds the new tokens counted in `length`: step_attend lets it start after that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.kernels.pieces import round_to_bf16
from qoqc.codegen.kernels.step_schedule import (
    all_pages,
    length_of,
    owner_of,
    pages_at,
    pause_before,
    run_start,
    start_of,
    workers_for,
)


@triton.jit
def quotient(sums, total, fits, ROUND_BF16: tl.constexpr):
    """sums / total: 0 where nothing was seen, NaN in a sequence without room for its token."""
    empty = total == 0
    out = tl.where(empty, 0.0, sums / tl.where(empty, 1.0, total))
    out = tl.where(fits, out, float("nan"))
    if ROUND_BF16:
        out = round_to_bf16(out)
    return out


@triton.jit
def part_of(worker, at_end):
    """Where a worker puts a part."""
    return 2 * worker + at_end.to(tl.int32)


@triton.jit
def combine_parts(
    part_ptr, stat_ptr, out, first_worker, inside_run, parts, first_row, first_d, fits,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """ROWS query heads by COLUMNS channels of the parts of workers from first_worker on.

    inside_run  the first of them has other pages before it. Loads go past L1, which does not see
    what other SMs have written.
    """
    d = first_d + tl.arange(0, COLUMNS)
    row = first_row + tl.arange(0, ROWS)
    in_row = row < GROUP
    in_out = in_row[:, None] & (d < V_DIM)[None, :]
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, parts, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)
        part = part_of(first_worker + i, (i == 0) & inside_run).to(tl.int64) * GROUP
        vector = part[:, None] + row[None, :]  # [AT_ONCE, ROWS]
        there = (i < parts)[:, None] & in_row[None, :]
        peaks = tl.load(stat_ptr + vector * 2, there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stat_ptr + vector * 2 + 1, there, other=0.0, cache_modifier=".cg")
        inside = (i < parts)[:, None, None] & in_out[None, :, :]
        place = part_ptr + vector[:, :, None] * V_DIM + d[None, None, :]
        sums = tl.load(place, inside, other=0.0, cache_modifier=".cg")
        new = tl.maximum(peak, tl.max(peaks, 0))
        # rows that have seen nothing have no peak to subtract: -inf - -inf would be NaN
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(peaks - base[None, :])
        total = total * shrink + tl.sum(weights * totals, 0)
        acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * sums, 0)
        peak = new
    result = quotient(acc, total[:, None], fits, ROUND_BF16)
    tl.store(out + row[:, None] * V_DIM + d[None, :], result.to(KIND), mask=in_out)


@triton.jit(do_not_specialize=["length_stride", "batch", "pages", "grid", "window"])
def step_combine(
    part_ptr,
    stat_ptr,
    out_ptr,
    length_ptr,
    length_stride,
    batch,
    pages,
    grid,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    KIND: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    DEPENDENT: tl.constexpr,
    SHORT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Query head `program_id(0)` of all, channels from `program_id(1)` * COLUMNS on."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    capacity = pages * 64
    if DEPENDENT:
        # what comes next waits for this kernel, as this one does for all before it
        gdc_launch_dependents()
    # before the wait: lengths are counted, and all before step_attend had ended when it said so
    total_pages, each = all_pages(
        length_ptr, length_stride, batch, capacity, window, KV_HEADS, HAS_WINDOW, True
    )
    workers = workers_for(total_pages, each, batch * KV_HEADS, grid, SHORT)
    length = length_of(length_ptr, length_stride, sequence, batch, capacity, True)
    used = pages_at(length, window, HAS_WINDOW)
    begin = sequence * (each * KV_HEADS)
    if each == 0:
        begin = start_of(
            sequence, length_ptr, length_stride, batch, capacity, window, KV_HEADS, HAS_WINDOW
        )
    pause = pause_before(each)
    begin += head // GROUP * (used + pause) + pause
    first_worker = owner_of(begin, total_pages, workers)
    parts = owner_of(begin + used - 1, total_pages, workers) - first_worker + 1
    inside_run = run_start(first_worker, total_pages, workers) < begin - pause
    if DEPENDENT:
        gdc_wait()
    if parts > 1:  # else the worker has written the output
        out = out_ptr + (sequence.to(tl.int64) * HEADS + head // GROUP * GROUP) * V_DIM
        combine_parts(
            part_ptr, stat_ptr, out, first_worker, inside_run, parts, head % GROUP,
            tl.program_id(1) * COLUMNS, length >= 0,
            GROUP, V_DIM, KIND, ROUND_BF16, 1, COLUMNS, AT_ONCE,
        )  # fmt: skip
