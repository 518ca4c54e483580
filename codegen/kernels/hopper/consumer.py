"""A consumer warpgroup: unpack weights in registers, multiply, add up, finish tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from qoqc.codegen.kernels.hopper.epilogue import (
    add_parts,
    as_columns,
    by_channel,
    by_token,
    finish,
)
from qoqc.codegen.kernels.hopper.schedule import next_part, place, turns
from qoqc.codegen.kernels.pieces import UNPACK_GROUP_PTX, UNPACK_PTX


@gluon.jit
def unpack(packed, word_buffer, GROUPED: gl.constexpr, BLOCK_N: gl.constexpr, A: gl.constexpr):
    """The low and high nibbles of [BLOCK_N, 64] bytes as int8 operands."""
    if GROUPED:
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        word = word_buffer._reinterpret(gl.int32, [BLOCK_N], flat).load(gl.SliceLayout(1, A))
        word = gl.expand_dims(word, 1).broadcast_to([BLOCK_N, 64])
        low, high = gl.inline_asm_elementwise(
            UNPACK_GROUP_PTX,
            "=r,=r,r,r,r,r,r",
            [packed, word],
            dtype=(gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = gl.inline_asm_elementwise(
            UNPACK_PTX, "=r,=r,r", [packed], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
        )
    return low, high


@gluon.constexpr_function
def packed_layout(rows):
    """Where [rows, 64] bytes lie that TMA stored as lines of 128 bytes, swizzled by 128 bytes.

    TMA moves 128-byte lines about 10 % faster than 64-byte ones, so two rows share a line.
    """
    columns = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32]]
    # chunk c of 16 bytes lies at c ^ (l % 8) of line l; c's highest bit tells a line's rows apart
    lines = [[1, 0], [2, 16], [4, 32], [9, 0]]
    blocks = [[1 << i, 0] for i in range(4, rows.bit_length() - 1)]
    return gl.SharedLinearLayout(columns + lines + blocks, alignment=1024)


@gluon.jit
def multiply(
    acc, ring, stage, ROW: gl.constexpr, WAY: gl.constexpr, GROUPED: gl.constexpr,
    BLOCK_N: gl.constexpr, ROWS: gl.constexpr, WAYS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Start adding the products of one k tile to acc."""
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    x_buffers, w_buffers, word_buffers, full, empty = ring
    slot = stage * WAYS + WAY
    lines = w_buffers.index(slot * ROWS + ROW)
    rows = lines._reinterpret(gl.uint8, [BLOCK_N, 64], packed_layout(BLOCK_N))
    packed = rows.load(A)
    low, high = unpack(packed, word_buffers.index(slot * ROWS + ROW), GROUPED, BLOCK_N, A)
    x = x_buffers.index(slot)
    x_low = x.slice(0, 64, dim=1).permute((1, 0))
    x_high = x.slice(64, 64, dim=1).permute((1, 0))
    acc = warpgroup_mma(low, x_low, acc, is_async=True)
    return warpgroup_mma(high, x_high, acc, is_async=True)


@gluon.jit
def consume(
    INDEX: gl.constexpr, work, ring, sums, scales, output,
    GROUPED: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, GLU: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, ROWS: gl.constexpr, WAYS: gl.constexpr,
    UNROLL: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: row block INDEX % ROWS, way INDEX // ROWS."""
    x_buffers, w_buffers, word_buffers, full, empty = ring
    sum_buffers, summed, taken, workspace_ptr, counter_ptr = sums
    y_desc, residual_desc, y_buffers, loaded, M, N = output
    tiles_m, tiles_n, steps, cut, parts = work
    token_scale_ptr, token_sum_ptr, channel_scale_ptr, zero_ptr, bias_ptr = scales
    ROW: gl.constexpr = INDEX % ROWS
    WAY: gl.constexpr = INDEX // ROWS
    WIDTH: gl.constexpr = BLOCK_M if BLOCK_M <= 128 else 128
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32]
    )
    turn = gl.program_id(0)
    stage = 0
    phase = 0
    round = 0
    finished = 0
    before = 0
    gdc_wait()
    while turn < turns(work):
        tile, first, last, turn = next_part(turn, work)
        tile_m, tile_n = place(tile, work, GROUP_M)
        first_m = tile_m * BLOCK_M
        first_n = (tile_n * ROWS + ROW) * BLOCK_N
        # asked for now, wanted when the loop, which hides their latency, has ended
        channel_scale = by_channel(channel_scale_ptr, first_n, N, BLOCK_N, MMA)
        token_scale = by_token(token_scale_ptr, first_m, M, BLOCK_M)
        if not GROUPED:
            zero = by_channel(zero_ptr, first_n, N, BLOCK_N, MMA)
            token_sum = by_token(token_sum_ptr, first_m, M, BLOCK_M)
        acc = gl.zeros([BLOCK_N, BLOCK_M], gl.int32, MMA)
        for _ in range(first, last):
            # one k tile is unpacked while the products of the one before run
            for i in gl.static_range(UNROLL):
                mbarrier.wait(full.index(stage), phase)
                acc = multiply(acc, ring, stage, ROW, WAY, GROUPED, BLOCK_N, ROWS, WAYS, MMA)
                if i > 0:
                    acc = warpgroup_mma_wait(2, deps=[acc])
                    mbarrier.arrive(empty.index(before), count=1)
                before = stage
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            # a product in flight across the loop's end would make ptxas serialise all of them
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(before), count=1)
        if WAYS > 1:
            if WAY > 0:
                mbarrier.wait(taken.index(ROW), (round & 1) ^ 1)
                sum_buffers.index((WAY - 1) * ROWS + ROW).store(acc)
                gl.thread_barrier()
                mbarrier.arrive(summed.index(ROW), count=1)
            else:
                mbarrier.wait(summed.index(ROW), round & 1)
                for way in gl.static_range(WAYS - 1):
                    acc += sum_buffers.index(way * ROWS + ROW).load(MMA)
                gl.thread_barrier()
                mbarrier.arrive(taken.index(ROW), count=1)
            round += 1
        if WAY == 0:
            complete = tile >= cut
            if SPLIT > 1:  # noqa: SIM102
                if tile < cut:
                    acc, complete = add_parts(
                        acc, workspace_ptr, counter_ptr, tile, parts, ROW, ROWS,
                        BLOCK_M, BLOCK_N, SPLIT, MMA,
                    )  # fmt: skip
            if complete:
                # the buffer of y is free once the store of the tile before has read it
                tma.store_wait(0)
                gl.thread_barrier()
                buffer = y_buffers.index(ROW)
                if not GROUPED:
                    # sum (q4 - zero) * x = sum q4 * x - zero * sum x
                    sums_of_columns = as_columns(token_sum, buffer, BLOCK_M, MMA)
                    acc -= gl.expand_dims(zero, 1) * gl.expand_dims(sums_of_columns, 0)
                finish(
                    acc, channel_scale, as_columns(token_scale, buffer, BLOCK_M, MMA), y_desc,
                    residual_desc, buffer, loaded.index(ROW), finished, bias_ptr, first_m,
                    first_n, N, HAS_BIAS, HAS_RESIDUAL, GLU, BLOCK_M, BLOCK_N, MMA,
                )  # fmt: skip
                finished += 1
    tma.store_wait(0)
