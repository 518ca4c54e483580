"""The producer warps: TMA copies of weights, group words and tokens into a ring of stages."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from qoqc.codegen.kernels.hopper.schedule import next_part, place, turns


@gluon.jit
def load_weights(
    work, k_tiles, early, descs, ring, GROUPED: gl.constexpr, BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr, WAYS: gl.constexpr, UNROLL: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """Fill the stages with WAYS k tiles of ROWS weight blocks."""
    w_desc, word_desc = descs
    x_buffers, w_buffers, word_buffers, full, empty = ring
    turn = gl.program_id(0)
    stage = 0
    phase = 1
    if early == 0:
        gdc_wait()
    while turn < turns(work):
        tile, first, last, turn = next_part(turn, work)
        tile_m, tile_n = place(tile, work, GROUP_M)
        for load in range(first * UNROLL, last * UNROLL):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            words: gl.constexpr = 4 if GROUPED else 0
            mbarrier.expect(bar, WAYS * ROWS * BLOCK_N * (64 + words))
            for way in gl.static_range(WAYS):
                k_tile = load * WAYS + way
                for row in gl.static_range(ROWS):
                    slot = (stage * WAYS + way) * ROWS + row
                    first_n = (tile_n * ROWS + row) * BLOCK_N
                    line = ((first_n // 128) * k_tiles + k_tile) * 64 + first_n % 128 // 2
                    tma.async_copy_global_to_shared(w_desc, [line, 0], bar, w_buffers.index(slot))
                    if GROUPED:
                        tma.async_copy_global_to_shared(
                            word_desc, [k_tile, first_n], bar, word_buffers.index(slot)
                        )
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def load_tokens(
    work, x_desc, ring, BLOCK_M: gl.constexpr, WAYS: gl.constexpr, UNROLL: gl.constexpr,
    STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Fill the stages with WAYS k tiles of BLOCK_M tokens, once the kernel before wrote them."""
    x_buffers, w_buffers, word_buffers, full, empty = ring
    turn = gl.program_id(0)
    stage = 0
    phase = 1
    gdc_wait()
    while turn < turns(work):
        tile, first, last, turn = next_part(turn, work)
        tile_m, tile_n = place(tile, work, GROUP_M)
        for load in range(first * UNROLL, last * UNROLL):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, WAYS * BLOCK_M * 128)
            for way in gl.static_range(WAYS):
                tma.async_copy_global_to_shared(
                    x_desc, [tile_m * BLOCK_M, (load * WAYS + way) * 128], bar,
                    x_buffers.index(stage * WAYS + way),
                )  # fmt: skip
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
