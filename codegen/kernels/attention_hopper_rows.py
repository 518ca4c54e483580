"""The consumers of attention_hopper: 64 rows of one KV head against all tiles of its tokens.

While the tensor cores multiply one tile's weights with its values, the warpgroup turns the scores
of the next tile into weights. Two warpgroups share the tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)

LIFT = gl.constexpr(14.0)
"""Weights are 2**LIFT at most: fp16 has 28 octaves of full precision below."""

Q_OCTAVE = gl.constexpr(8)
"""The largest channel of a bf16 query becomes less than 2**Q_OCTAVE in fp16."""


@gluon.jit
def first_step():
    """How far the first item of a block, number program_id(0), is from its second.

    Items are dealt to blocks to and fro: the first block's second item is the last of its round, as
    its first was the longest.
    """
    return 2 * (gl.num_programs(0) - gl.program_id(0)) - 1


@gluon.jit
def item_of(item, work, GROUP: gl.constexpr, CAUSAL: gl.constexpr, TOKENS: gl.constexpr):
    """Item `item` of a launch: its sequence, KV head and first row, and the tokens its rows see.

    All rows see the first `whole` tiles of tokens, no row sees one from `used` on. The longest row
    tiles of all heads come first.
    """
    length_ptr, length_stride, capacity, heads, seq, pairs, items = work
    b = (item % pairs // heads).to(gl.int64)
    first_row = (items // pairs - 1 - item // pairs) * 128
    true_length = gl.load(length_ptr + b * length_stride)
    # a longer sequence has no table entries to read: it gives NaN
    overflow = true_length > capacity
    length = gl.where(overflow, 0, gl.maximum(true_length, 0)).to(gl.int32)
    # no row sees a token from `end` on; all see those before `begin`
    end = length
    begin = length
    if CAUSAL:
        end = gl.minimum(length, gl.maximum(length - seq + (first_row + 127) // GROUP + 1, 0))
        begin = gl.minimum(length, gl.maximum(length - seq + first_row // GROUP + 1, 0))
    whole = begin // TOKENS
    used = (end + TOKENS - 1) // TOKENS
    return b, item % heads, first_row, length, whole, used, overflow


@gluon.jit
def weights_of(s, peak, factor):
    """One online-softmax step over scores s [64, T], -inf where not seen.

    Returns the new peak (of s * factor, in log2), by how much older sums shrink, and the tile's
    weights times 2**LIFT.
    """
    new = gl.maximum(peak, gl.max(s, 1) * factor)
    # a row that has seen nothing has no peak to subtract: -inf - -inf would be NaN
    base = gl.where(new == float("-inf"), 0.0, new)
    shrink = gl.exp2(peak - base)
    p = gl.exp2(s * gl.expand_dims(factor, 1) - gl.expand_dims(base - LIFT, 1))
    return new, shrink, p


@gluon.jit
def load_queries(queries, b, h, first_row, seq, DIM: gl.constexpr, GROUP: gl.constexpr,
                 L: gl.constexpr):  # fmt: skip
    """64 rows of queries as they are, zeros behind the last."""
    q_ptr, stride_b, stride_h, stride_s = queries
    c = gl.arange(0, DIM, layout=gl.SliceLayout(0, L))
    row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    query = row // GROUP
    start = (h * GROUP + row % GROUP).to(gl.int64) * stride_h + query.to(gl.int64) * stride_s
    return gl.load(
        q_ptr + b * stride_b + gl.expand_dims(start, 1) + gl.expand_dims(c, 0),
        mask=gl.expand_dims(query < seq, 1), other=0.0,
    )  # fmt: skip


@gluon.jit
def as_operand(q, scale, BF16: gl.constexpr, L: gl.constexpr):
    """Rows of queries as an fp16 operand, and by what their products become scores in log2.

    bf16 has numbers that fp16 has not: such a row is scaled by a power of two.
    """
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    # a product must not turn the -inf of unseen tokens into anything else
    factor = gl.zeros_like(row).to(gl.float32) + gl.maximum(gl.abs(scale) * LOG2E, 1e-30)
    q = q * gl.where(scale < 0, -1.0, 1.0).to(q.dtype)
    if BF16:
        q = q.to(gl.float32)
        most = gl.max(gl.abs(q), 1)
        # 2**(octave - 127) <= most; the factors below stay normal numbers
        octave = gl.minimum(gl.maximum(most.to(gl.int32, bitcast=True) >> 23, 32), 222)
        up = ((127 + 127 + Q_OCTAVE - 1 - octave) << 23).to(gl.float32, bitcast=True)
        down = ((octave - Q_OCTAVE + 1) << 23).to(gl.float32, bitcast=True)
        q = q * gl.expand_dims(up, 1)
        factor = factor * down
    return q.to(gl.float16), factor


@gluon.jit
def advance(
    acc, total, peak, p, tile, stage, phase, limit, column, q, factor, ring,
    MASKED: gl.constexpr, DIM: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Weights of `tile`, the one behind `stage`, while those of `stage` meet their values."""
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = ring
    after = stage + 1
    if after == STAGES:
        after = 0
        phase ^= 1
    mbarrier.wait(k_full.index(after), phase)
    # carried as fp32: ptxas would exchange the halves of carried fp16 pairs, and back
    weights = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(0, MMA_O, 2))
    none = gl.zeros([64, TOKENS], gl.float32, MMA_S)
    s = warpgroup_mma(q, k_buffers.index(after).permute((1, 0)), none, use_acc=False, is_async=True)
    acc = warpgroup_mma(weights, v_buffers.index(stage), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(after), count=1)
    if MASKED:
        seen = gl.expand_dims(tile * TOKENS + column, 0) < gl.expand_dims(limit, 1)
        s = gl.where(seen, s, float("-inf"))
    peak, shrink, p = weights_of(s, peak, factor)
    total = total * shrink + gl.sum(p, 1)
    # for the next turn. Here, because ptxas would put the softmax behind the wait for the
    # products below, and into their way; it does not move it past a branch
    mbarrier.wait(v_full.index(after), phase)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(stage), count=1)
    acc *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, MMA_O)), 1)
    return acc, total, peak, p, after, phase


@gluon.jit
def attend(
    INDEX: gl.constexpr, work, queries, out_ptr, ring, sinks_ptr, scale, HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr, DIM: gl.constexpr, CAUSAL: gl.constexpr, HAS_SINKS: gl.constexpr,
    BF16: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows INDEX * 64 .. + 63 of the block's row tiles, from their queries to their outputs."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROWS_S: gl.constexpr = gl.SliceLayout(1, MMA_S)
    ROWS_O: gl.constexpr = gl.SliceLayout(1, MMA_O)
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    length_ptr, length_stride, capacity, heads, seq, pairs, items = work
    q_buffers, tiles = ring
    k_buffers, v_buffers, k_full, k_empty, v_full, v_empty = tiles
    q = q_buffers.index(INDEX)
    column = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, MMA_S))
    stage = 0
    phase = 0
    item = gl.program_id(0)
    step = first_step()
    b, h, first_row, length, whole, used, overflow = item_of(item, work, GROUP, CAUSAL, TOKENS)
    first_row += INDEX * 64
    asked = load_queries(queries, b, h, first_row, seq, DIM, GROUP, Q)
    while item < items:
        operand, factor = as_operand(asked, scale, BF16, Q)
        q.store(operand)
        fence_async_shared()
        gl.thread_barrier()
        factor = gl.convert_layout(factor, ROWS_S)
        row = first_row + gl.arange(0, 64, layout=ROWS_S)
        limit = gl.full([64], 0, gl.int32, ROWS_S) + length
        if CAUSAL:
            limit = gl.minimum(limit, length - seq + row // GROUP + 1)
        peak = gl.full([64], float("-inf"), gl.float32, ROWS_S)
        total = gl.zeros([64], gl.float32, ROWS_S)
        acc = gl.zeros([64, DIM], gl.float32, MMA_O)
        p = gl.zeros([64, TOKENS], gl.float32, MMA_S)
        if used > 0:
            # from the last tile on, the one that needs a mask
            none = gl.zeros([64, TOKENS], gl.float32, MMA_S)
            mbarrier.wait(k_full.index(stage), phase)
            keys = k_buffers.index(stage).permute((1, 0))
            s = warpgroup_mma(q, keys, none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            seen = gl.expand_dims((used - 1) * TOKENS + column, 0) < gl.expand_dims(limit, 1)
            s = gl.where(seen, s, float("-inf"))
            peak, shrink, p = weights_of(s, peak, factor)
            total = gl.sum(p, 1)
            mbarrier.wait(v_full.index(stage), phase)
            # Loops of their own, because in two branches of one loop ptxas (CUDA 12.8) takes the
            # addresses of tiles in one from registers that only the other sets
            for i in range(1, used - whole):
                acc, total, peak, p, stage, phase = advance(
                    acc, total, peak, p, used - 1 - i, stage, phase, limit, column, q, factor,
                    tiles, True, DIM, TOKENS, STAGES,
                )  # fmt: skip
            for i in range(gl.maximum(used - whole, 1), used):
                acc, total, peak, p, stage, phase = advance(
                    acc, total, peak, p, used - 1 - i, stage, phase, limit, column, q, factor,
                    tiles, False, DIM, TOKENS, STAGES,
                )  # fmt: skip
        # the next item's queries are on their way while this one is finished
        item += step
        step = 2 * gl.num_programs(0) - step
        next_b, next_h, next_first_row, next_length, next_whole, next_used, next_overflow = item_of(
            gl.minimum(item, items - 1), work, GROUP, CAUSAL, TOKENS
        )  # fmt: skip
        next_first_row += INDEX * 64
        asked = load_queries(queries, next_b, next_h, next_first_row, seq, DIM, GROUP, Q)
        if used > 0:
            weights = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(0, MMA_O, 2))
            acc = warpgroup_mma(weights, v_buffers.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1

        if HAS_SINKS:
            head = h * GROUP + row % GROUP
            sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2E
            # in weights of 2**LIFT, relative to the peak that scores are relative to
            base = gl.where(peak == float("-inf"), 0.0, peak)
            summit = gl.maximum(base, sink)
            shrink = gl.exp2(base - summit)
            total = total * shrink + gl.exp2(sink - summit + LIFT)
            acc *= gl.expand_dims(gl.convert_layout(shrink, ROWS_O), 1)
        inverse = gl.where(total == 0, 0.0, 1.0 / gl.where(total == 0, 1.0, total))
        inverse = gl.where(overflow, float("nan"), inverse)
        out = acc * gl.expand_dims(gl.convert_layout(inverse, ROWS_O), 1)
        # by way of the queries' buffer, whose products are done: whole lines are written so
        kind: gl.constexpr = out_ptr.dtype.element_ty
        q.store(out.to(kind).to(gl.float16, bitcast=True))
        gl.thread_barrier()
        out = q.load(Q).to(kind, bitcast=True)
        out_row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, Q))
        d = gl.arange(0, DIM, layout=gl.SliceLayout(0, Q))
        query = out_row // GROUP
        start = ((b * HEADS + h * GROUP + out_row % GROUP) * seq + query) * DIM
        gl.store(
            out_ptr + gl.expand_dims(start, 1) + gl.expand_dims(d, 0),
            out, mask=gl.expand_dims(query < seq, 1),
        )  # fmt: skip
        # what comes next into that buffer must not overtake
        gl.thread_barrier()
        b, h, first_row, length, whole, used, overflow = (
            next_b,
            next_h,
            next_first_row,
            next_length,
            next_whole,
            next_used,
            next_overflow,
        )
