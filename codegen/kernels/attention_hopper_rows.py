"""The consumers of attention_hopper: 64 rows of one KV head against all tiles of its tokens.

While the tensor cores multiply one tile's weights with its values, the warpgroup turns the scores
of the next tile into weights; two warpgroups share the tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qoqc.codegen.kernels.attention_hopper_pages import nibble_order

LOG2E = gl.constexpr(1.4426950408889634)

LIFT = gl.constexpr(14.0)
"""Weights are 2**LIFT at most: fp16 has 28 octaves of full precision below."""

Q_OCTAVE = gl.constexpr(8)
"""The largest channel of a bf16 query becomes less than 2**Q_OCTAVE in fp16."""


@gluon.jit
def weights_of(s, peak, factor):
    """One online-softmax step over scores s [64, 64], -inf where not seen.

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
def load_queries(q_ptr, stride_h, stride_s, row, first_head, seq, scale, DIM: gl.constexpr,
                 GROUP: gl.constexpr, BF16: gl.constexpr, A: gl.constexpr):  # fmt: skip
    """Rows of queries as an fp16 operand, and by what their products become scores in log2.

    bf16 has numbers that fp16 has not: such a row is scaled by a power of two.
    """
    c = gl.arange(0, DIM, layout=gl.SliceLayout(0, A))
    query = row // GROUP
    start = (first_head + row % GROUP).to(gl.int64) * stride_h + query.to(gl.int64) * stride_s
    q = gl.load(
        q_ptr + gl.expand_dims(start, 1) + gl.expand_dims(nibble_order(c), 0),
        mask=gl.expand_dims(query < seq, 1), other=0.0,
    )  # fmt: skip
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
def attend_masked(acc, total, peak, seen, q, factor, values, ring, stage, phase, DIM: gl.constexpr):
    """One tile, in which rows see what `seen` [64, 64] says: the new acc, total and peak."""
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    MMA_T: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    k_buffers, v_buffers, ones, k_full, k_empty, v_full, v_empty = ring
    none = gl.zeros([64, 64], gl.float32, MMA_S)
    mbarrier.wait(k_full.index(stage), phase)
    s = warpgroup_mma(q, k_buffers.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(stage), count=1)
    s = gl.where(seen, s, float("-inf"))
    peak, shrink, p = weights_of(s, peak, factor)
    acc *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, MMA_O)), 1)
    total *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, MMA_T)), 1)
    weights = gl.convert_layout(p.to(gl.float16), gl.DotOperandLayout(0, MMA_O, 2))
    again = gl.convert_layout(weights, gl.DotOperandLayout(0, MMA_T, 2))
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(weights, values, acc, is_async=True)
    total = warpgroup_mma(again, ones.permute((1, 0)), total, is_async=True)
    acc, total = warpgroup_mma_wait(0, deps=[acc, total])
    mbarrier.arrive(v_empty.index(stage), count=1)
    return acc, total, peak


@gluon.jit
def attend(
    INDEX: gl.constexpr, extent, queries, output, ring, sinks_ptr, scale, seq,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, HAS_CHUNK: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_SINKS: gl.constexpr, BF16: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows INDEX * 64 .. + 63 of the block, from their queries to their outputs."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA_S, 2)
    P: gl.constexpr = gl.DotOperandLayout(0, MMA_O, 2)
    MMA_T: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    P_T: gl.constexpr = gl.DotOperandLayout(0, MMA_T, 2)
    ROWS_T: gl.constexpr = gl.SliceLayout(1, MMA_T)
    ROWS_S: gl.constexpr = gl.SliceLayout(1, MMA_S)
    ROWS_O: gl.constexpr = gl.SliceLayout(1, MMA_O)
    V_CHUNK: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    length, cached, used, whole, tiles = extent
    q_ptr, q_stride_h, q_stride_s = queries
    out_ptr, overflow = output
    k_buffers, v_buffers, ones, k_full, k_empty, v_full, v_empty = ring
    h = gl.program_id(1)
    first_row = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128 + INDEX * 64
    q, factor = load_queries(
        q_ptr, q_stride_h, q_stride_s, first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, A)),
        h * GROUP, seq, scale, DIM, GROUP, BF16, A,
    )  # fmt: skip
    factor = gl.convert_layout(factor, ROWS_S)
    row = first_row + gl.arange(0, 64, layout=ROWS_S)
    position = length - seq + row // GROUP
    column = nibble_order(gl.arange(0, 64, layout=gl.SliceLayout(0, MMA_S)))
    peak = gl.full([64], float("-inf"), gl.float32, ROWS_S)
    # the sum of a row's weights, eight times, by tensor cores: adding them up takes as many
    # instructions as the exponential
    total = gl.zeros([64, 8], gl.float32, MMA_T)
    none = gl.zeros([64, 64], gl.float32, MMA_S)
    acc = gl.zeros([64, DIM], gl.float32, MMA_O)
    stage = 0
    phase = 0
    if whole > 0:
        mbarrier.wait(k_full.index(0), 0)
        s = warpgroup_mma(q, k_buffers.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(0), count=1)
        peak, shrink, p = weights_of(s, peak, factor)
        weights = gl.convert_layout(p.to(gl.float16), P)
        mbarrier.wait(v_full.index(0), 0)
        for _ in range(1, whole):
            after = stage + 1
            if after == STAGES:
                after = 0
                phase ^= 1
            mbarrier.wait(k_full.index(after), phase)
            s = warpgroup_mma(
                q, k_buffers.index(after).permute((1, 0)), none, use_acc=False, is_async=True
            )
            acc = warpgroup_mma(weights, v_buffers.index(stage).permute((1, 0)), acc, is_async=True)
            total = warpgroup_mma(
                gl.convert_layout(weights, P_T), ones.permute((1, 0)), total, is_async=True
            )
            s = warpgroup_mma_wait(2, deps=[s])
            mbarrier.arrive(k_empty.index(after), count=1)
            peak, shrink, p = weights_of(s, peak, factor)
            # for the next turn. Here, because ptxas would put the softmax behind the wait for the
            # products below, and into their way; it does not move it past a branch
            mbarrier.wait(v_full.index(after), phase)
            acc, total = warpgroup_mma_wait(0, deps=[acc, total])
            mbarrier.arrive(v_empty.index(stage), count=1)
            acc *= gl.expand_dims(gl.convert_layout(shrink, ROWS_O), 1)
            total *= gl.expand_dims(gl.convert_layout(shrink, ROWS_T), 1)
            weights = gl.convert_layout(p.to(gl.float16), P)
            stage = after
        acc = warpgroup_mma(weights, v_buffers.index(stage).permute((1, 0)), acc, is_async=True)
        total = warpgroup_mma(
            gl.convert_layout(weights, P_T), ones.permute((1, 0)), total, is_async=True
        )
        acc, total = warpgroup_mma_wait(0, deps=[acc, total])
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1

    # pages that not all rows see whole, then the exact tokens of the chunk. Loops of their own:
    # with the products in two branches of one loop ptxas (CUDA 12.8) takes the addresses of tiles
    # in one from registers that only the other sets
    limit = gl.full([64], 0, gl.int32, ROWS_S) + cached
    if CAUSAL:
        limit = gl.minimum(limit, position + 1)
    for i in range(whole, used):
        seen = gl.expand_dims(i * 64 + column, 0) < gl.expand_dims(limit, 1)
        values = v_buffers.index(stage).permute((1, 0))
        acc, total, peak = attend_masked(
            acc, total, peak, seen, q, factor, values, ring, stage, phase, DIM
        )
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if HAS_CHUNK:
        limit = gl.full([64], 0, gl.int32, ROWS_S) + length
        if CAUSAL:
            limit = gl.minimum(limit, position + 1)
        for i in range(tiles):
            # a chunk may be longer than its sequence
            token = gl.expand_dims(i * 64 + length - seq + column, 0)
            seen = (token >= 0) & (token < gl.expand_dims(limit, 1))
            values = v_buffers.index(stage)._reinterpret(gl.float16, [64, DIM], V_CHUNK)
            acc, total, peak = attend_masked(
                acc, total, peak, seen, q, factor, values, ring, stage, phase, DIM
            )
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1

    total = gl.convert_layout(gl.max(total, 1), ROWS_S)
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
    out_row = first_row + gl.arange(0, 64, layout=ROWS_O)
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA_O))
    query = out_row // GROUP
    start = ((h * GROUP + out_row % GROUP).to(gl.int64) * seq + query) * DIM
    gl.store(
        out_ptr + gl.expand_dims(start, 1) + gl.expand_dims(d, 0),
        out.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(query < seq, 1),
    )  # fmt: skip
