"""The Gluon template of the W4A8 GEMM for sm_90: TMA producers, register-A wgmma consumers.

A block is two producer warps and ROWS * WAYS consumer warpgroups. ROWS of them stack along the
output channels, BLOCK_N each; WAYS of them share channels and take every WAYS-th k tile, so that
several short chains (wait, unpack, multiply) overlap where tokens are few. The weights are operand
A, unpacked in registers, as in gemm_plain: acc is y transposed.

The grid is persistent. Tiles that would not fill the last wave are cut along K into `parts` equal
parts (int32 sums of the parts add up to the same bits in any order): a block leaves its part in
the workspace, and the last to arrive adds them and finishes the tile.

Under programmatic dependent launch the weight producer does not wait for the kernel before: while
that one drains, the first stages of weights are on their way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from qoqc.codegen.kernels.hopper.consumer import consume
from qoqc.codegen.kernels.hopper.producers import load_tokens, load_weights


@gluon.jit(do_not_specialize=["M", "N", "k_tiles", "early", "cut", "parts"])
def gemm_hopper_kernel(
    x_desc,  # [M, K] int8, boxes [BLOCK_M, 128]
    w_desc,  # [N/128 * K/128 * 64, 128] uint8 packed tiles, boxes [BLOCK_N / 2, 128]
    word_desc,  # [K/128, N] int32 group words, boxes [1, BLOCK_N]; any descriptor per channel
    y_desc,  # [M, N], boxes [BLOCK_M, BLOCK_N]; half as wide if GLU
    residual_desc,  # [M, N], boxes [BLOCK_M, BLOCK_N]; y_desc if there is none
    token_scale_ptr,  # [M] fp32
    token_sum_ptr,  # [M] int32, read per channel only
    channel_scale_ptr,  # [N] fp32
    zero_ptr,  # [N] int32 channel zeros, read per channel only
    bias_ptr,  # [N], read if HAS_BIAS
    workspace_ptr,  # [cut * parts, ROWS, BLOCK_N, BLOCK_M] int32, any content
    counter_ptr,  # [cut, ROWS] int32, zeros; zeros again when the kernel ends
    M,
    N,
    k_tiles,  # K / 128, rounded up
    early,  # 1: the kernel before does not write weights, start on them while it ends; 0: wait
    cut,  # how many tiles are cut along K: the first ones
    parts,  # into how many parts, at most SPLIT and the steps of a tile; cut * parts <= blocks
    GROUPED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    GLU: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr,
    WAYS: gl.constexpr,
    UNROLL: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    SPLIT: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """A persistent block; see the module's docstring."""
    SLOTS: gl.constexpr = STAGES * WAYS
    x_buffers = gl.allocate_shared_memory(gl.int8, [SLOTS, BLOCK_M, 128], x_desc.layout)
    w_buffers = gl.allocate_shared_memory(
        gl.uint8, [ROWS * SLOTS, BLOCK_N // 2, 128], w_desc.layout
    )
    OUT_N: gl.constexpr = BLOCK_N // 2 if GLU else BLOCK_N
    y_buffers = gl.allocate_shared_memory(y_desc.dtype, [ROWS, BLOCK_M, OUT_N], y_desc.layout)
    # stand-ins where a buffer is not needed
    word_buffers = w_buffers
    if GROUPED:
        word_buffers = gl.allocate_shared_memory(
            gl.int32, [ROWS * SLOTS, 1, BLOCK_N], word_desc.layout
        )
    sum_buffers = w_buffers
    if WAYS > 1:
        # four threads store 32 bytes of a row: four rows next to each other fill the banks
        sum_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
        sum_buffers = gl.allocate_shared_memory(
            gl.int32, [ROWS * (WAYS - 1), BLOCK_N, BLOCK_M], sum_layout
        )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [ROWS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [ROWS, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [ROWS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # weights and tokens
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=ROWS * WAYS)
    for i in gl.static_range(ROWS):
        mbarrier.init(summed.index(i), count=WAYS - 1 if WAYS > 1 else 1)
        mbarrier.init(taken.index(i), count=1)
        mbarrier.init(loaded.index(i), count=1)
    fence_async_shared()
    gdc_launch_dependents()
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n = (N + ROWS * BLOCK_N - 1) // (ROWS * BLOCK_N)
    # k tiles beyond the last multiply zeros
    steps = (k_tiles + WAYS * UNROLL - 1) // (WAYS * UNROLL)
    work = (tiles_m, tiles_n, steps, cut, parts)
    descs = (w_desc, word_desc)
    ring = (x_buffers, w_buffers, word_buffers, full, empty)
    sums = (sum_buffers, summed, taken, workspace_ptr, counter_ptr)
    scales = (token_scale_ptr, token_sum_ptr, channel_scale_ptr, zero_ptr, bias_ptr)
    output = (y_desc, residual_desc, y_buffers, loaded, M, N)
    # constexprs stay constexprs only where the tuples are written out
    if ROWS * WAYS == 2:
        gl.warp_specialize(
            [
                (consume, (0, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (consume, (1, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (load_weights, (work, k_tiles, early, descs, ring, GROUPED, BLOCK_N, ROWS, WAYS,
                                UNROLL, STAGES, GROUP_M)),
                (load_tokens, (work, x_desc, ring, BLOCK_M, WAYS, UNROLL, STAGES, GROUP_M)),
            ],
            [4, 1, 1], [REGISTERS, 24, 24],
        )  # fmt: skip
    elif ROWS * WAYS == 3:
        gl.warp_specialize(
            [
                (consume, (0, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (consume, (1, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (consume, (2, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (load_weights, (work, k_tiles, early, descs, ring, GROUPED, BLOCK_N, ROWS, WAYS,
                                UNROLL, STAGES, GROUP_M)),
                (load_tokens, (work, x_desc, ring, BLOCK_M, WAYS, UNROLL, STAGES, GROUP_M)),
            ],
            [4, 4, 1, 1], [REGISTERS, REGISTERS, 24, 24],
        )  # fmt: skip
    else:
        gl.static_assert(ROWS * WAYS == 4, "2 to 4 consumer warpgroups")
        gl.warp_specialize(
            [
                (consume, (0, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (consume, (1, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (consume, (2, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (consume, (3, work, ring, sums, scales, output, GROUPED, HAS_BIAS, HAS_RESIDUAL,
                           GLU, BLOCK_M, BLOCK_N, ROWS, WAYS, UNROLL, STAGES, GROUP_M, SPLIT)),
                (load_weights, (work, k_tiles, early, descs, ring, GROUPED, BLOCK_N, ROWS, WAYS,
                                UNROLL, STAGES, GROUP_M)),
                (load_tokens, (work, x_desc, ring, BLOCK_M, WAYS, UNROLL, STAGES, GROUP_M)),
            ],
            [4, 4, 4, 1, 1], [REGISTERS, REGISTERS, REGISTERS, 24, 24],
        )  # fmt: skip
