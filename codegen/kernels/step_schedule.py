"""How a decode step divides the pages of all sequences and KV heads among its blocks, evenly.

The pages stand in one row: sequence by sequence, in each head by head. Every block ("worker") takes
an equal run of that row, whatever lengths sequences have, so that all end together. The piece of a
run that lies in one (sequence, head) is a part; a worker has parts of its own only at both ends of
its run, between them are whole sequences and heads. Where lengths differ some workers have many
short ones: there CHANGE empty places stand before the pages of each (sequence, head), for the time
that going over to it takes. Only the device knows the lengths, so each worker reads them all. With
HAS_WINDOW a sequence has the pages of its last `window` tokens only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from qoqc.ir.spec import PAGE
from qoqc.quant.pack import ceil_div

TOKENS = tl.constexpr(PAGE)
SCAN = tl.constexpr(128)
"""Sequences whose lengths are read at a time."""

PAUSE = tl.constexpr(4)
"""Pages that runs of whole (sequence, head) may be longer than equal ones, where lengths are equal:
in whose time a worker begins another and adds it up with others."""

CHANGE = tl.constexpr(2)
"""Pages in whose time a worker goes over to another (sequence, head), 4 us on an H200."""

LEAVES = tl.constexpr(32)
"""Counters below the one that tells the last of many programs: an atomic takes its turn."""

SHORTEST = 2
"""Pages of a worker at least: less does not pay for its start."""


@triton.jit
def length_of(length_ptr, length_stride, b, batch, capacity, COUNTED: tl.constexpr):
    """The tokens in sequences `b` without their newest, -1 if there is no room for it: int32.

    COUNTED  the newest are counted already
    Read past L1, which may hold what was there before another kernel counted.
    """
    place = length_ptr + b.to(tl.int64) * length_stride
    length = tl.load(place, mask=b < batch, other=-1, cache_modifier=".cg")
    if COUNTED:
        length -= 1
    return tl.where((length < 0) | (length >= capacity), -1, length).to(tl.int32)


@triton.jit
def first_page(length, window):
    """The page of the oldest token that the newest one sees, in sequences with a `length_of`."""
    return tl.maximum(length + 1 - window, 0) // TOKENS


@triton.jit
def pages_at(length, window, HAS_WINDOW: tl.constexpr):
    """Pages that the newest token of sequences with a `length_of` needs: without room 1, unread."""
    pages = tl.maximum(length, 0) // TOKENS + 1
    if HAS_WINDOW:
        pages -= first_page(length, window)
    return pages


@triton.jit
def pages_of(
    length_ptr, length_stride, b, batch, capacity, window,
    HAS_WINDOW: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """`pages_at` of the sequences `b`, 0 for those from `batch` on."""
    length = length_of(length_ptr, length_stride, b, batch, capacity, COUNTED)
    pages = pages_at(length, window, HAS_WINDOW)
    return tl.where(b < batch, pages, 0)


@triton.jit
def all_pages(
    length_ptr, length_stride, batch, capacity, window,
    KV_HEADS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    COUNTED: tl.constexpr,
):  # fmt: skip
    """How many places the row has, and how many pages each (sequence, head): 0 if they differ."""
    total = tl.full((), 0, tl.int32)
    least = tl.full((), 0x7FFFFFFF, tl.int32)
    most = tl.full((), 0, tl.int32)
    for first in range(0, batch, SCAN):
        b = first + tl.arange(0, SCAN)
        pages = pages_of(length_ptr, length_stride, b, batch, capacity, window, HAS_WINDOW, COUNTED)
        total += tl.sum(pages, 0)
        most = tl.maximum(most, tl.max(pages, 0))
        least = tl.minimum(least, tl.min(tl.where(b < batch, pages, 0x7FFFFFFF), 0))
    equal = least == most
    total += tl.where(equal, 0, batch * CHANGE)
    return total * KV_HEADS, tl.where(equal, most, 0)


@triton.jit
def pause_before(each):
    """Empty places before the pages of each (sequence, head), for what `all_pages` gives."""
    return tl.where(each > 0, 0, CHANGE)


@triton.jit
def workers_for(total, each, heads, grid, SHORT: tl.constexpr):
    """How many of the `grid` blocks have work.

    each   pages of every (sequence, head) if equal: then a few workers less may be better, whose
           runs begin where a (sequence, head) does, since going over to another costs PAUSE pages
    heads  (sequence, head) pairs
    """
    workers = tl.minimum(grid, (total + SHORT - 1) // SHORT)
    if each > 0:
        if heads <= workers:
            whole = heads * tl.minimum(workers // heads, each)
        else:
            together = (heads + workers - 1) // workers  # (sequence, head) of a worker
            whole = (heads + together - 1) // together
        if (total + whole - 1) // whole <= (total + workers - 1) // workers + PAUSE:
            workers = whole
    return workers


@triton.jit
def run_start(worker, total, workers):
    """worker * total / workers, rounded up: where a run begins; it ends where the next one begins.

    Up, so that of a sequence's workers the last, which puts its token in, has no page more. In 32
    bits, since 64-bit divisions are long calls.
    """
    pages = total // workers
    return worker * pages + (worker * (total - pages * workers) + workers - 1) // workers


@triton.jit
def owner_of(place, total, workers):
    """The worker whose run holds a place of the row."""
    share = workers.to(tl.float32) / total.to(tl.float32)
    owner = (place.to(tl.float32) * share).to(tl.int32)
    # rounding moves it by one at most
    if run_start(owner, total, workers) > place:
        owner -= 1
    elif run_start(owner + 1, total, workers) <= place:
        owner += 1
    return owner


@triton.jit
def find_sequence(
    place, length_ptr, length_stride, batch, capacity, window,
    KV_HEADS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The sequence that holds a place of the row, and where it begins: where lengths differ."""
    sequence = tl.full((), 0, tl.int32)
    before = tl.full((), 0, tl.int32)
    seen = tl.full((), 0, tl.int32)
    for first in range(0, batch, SCAN):
        b = first + tl.arange(0, SCAN)
        pages = pages_of(length_ptr, length_stride, b, batch, capacity, window, HAS_WINDOW, False)
        pages += tl.where(b < batch, CHANGE, 0)
        ends = seen + tl.cumsum(pages, 0)
        passed = (ends * KV_HEADS <= place) & (b < batch)
        sequence += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0), 0))
        seen += tl.sum(pages, 0)
    return sequence, before * KV_HEADS


@triton.jit
def start_of(
    sequence, length_ptr, length_stride, batch, capacity, window,
    KV_HEADS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Where a sequence begins, where lengths differ; they are counted."""
    before = tl.full((), 0, tl.int32)
    for first in range(0, sequence, SCAN):
        b = first + tl.arange(0, SCAN)
        pages = pages_of(length_ptr, length_stride, b, batch, capacity, window, HAS_WINDOW, True)
        before += tl.sum(tl.where(b < sequence, pages + CHANGE, 0), 0)
    return before * KV_HEADS


@triton.jit
def arrive(counter_ptr, program, counts):
    """Count this program in if it `counts`: it reads no length any more. For `comes_last`.

    counts  bool, computed from every length that was read: so these are there before the program
            counts, and no fence is needed, which would wait for all its other memory accesses
    Gives a tensor, whose value is waited for where it is used: not here, where memory is busy.
    """
    lane = tl.arange(0, 32)
    counters = counter_ptr + 1 + program % LEAVES + tl.zeros((32,), tl.int32)
    # one thread counts for all of them
    tl.debug_barrier()
    return tl.atomic_add(counters, 1, mask=(lane == 0) & counts, sem="relaxed", scope="gpu")


@triton.jit
def comes_last(counter_ptr, arrived, program, programs):
    """1 in the program of all that was the last to `arrive`, else 0.

    counter_ptr  int32 [1 + LEAVES] zeros, left as zeros
    """
    leaf = program % LEAVES
    last = tl.full((), 0, tl.int32)
    before = tl.sum(tl.where(tl.arange(0, 32) == 0, arrived, 0), 0)
    if before == (programs - leaf + LEAVES - 1) // LEAVES - 1:
        tl.store(counter_ptr + 1 + leaf, 0)
        leaves = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if leaves == tl.minimum(programs, LEAVES) - 1:
            tl.store(counter_ptr, 0)
            last += 1
    return last


@triton.jit
def let_next_start(
    counter_ptr, arrived, worker, length_ptr, length_stride, batch, DEPENDENT: tl.constexpr
):
    """Count the tokens if this worker was the last to `arrive`; the next kernel may start then.

    It starts when all workers have said so: it finds lengths counted, even before its wait.
    """
    if comes_last(counter_ptr, arrived, worker, tl.num_programs(0)) != 0:
        count_tokens(length_ptr, length_stride, batch)
        if DEPENDENT:
            fence()
    if DEPENDENT:
        # one thread speaks for all
        tl.debug_barrier()
        gdc_launch_dependents()


@triton.jit
def fence():
    """What this thread has written so far is there for the whole device before it goes on."""
    tl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, 0;",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def count_tokens(length_ptr, length_stride, batch):
    """Add 1 to all lengths, in the one program that does."""
    for first in range(0, batch, SCAN):
        b = first + tl.arange(0, SCAN)
        place = length_ptr + b.to(tl.int64) * length_stride
        length = tl.load(place, mask=b < batch, other=0)
        tl.store(place, length + 1, mask=b < batch)


def counters_for(batch: int, kv_heads: int) -> int:
    """How many counters a step needs: those of comes_last, then one per (sequence, head)."""
    return 1 + int(LEAVES) + batch * kv_heads


def grid_for(batch: int, kv_heads: int, pages: int, slots: int, window: int = 0) -> int:
    """Blocks to launch for sequences of up to `pages` pages, on a device that holds `slots`."""
    if window:
        # as many pages as `window` tokens touch at most
        pages = min(pages, ceil_div(window - 1, PAGE) + 1)
    return max(1, min(slots, ceil_div(batch * kv_heads * pages, SHORTEST)))
