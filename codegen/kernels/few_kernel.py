"""The Gluon template of a linear for one token at a time: norm, quantize and multiply.

A block takes ROWS output channels at a time over all of K. Its warps share K; a thread multiplies
16 bytes of a packed row, which are 32 input channels of one group, by integer dot products of
four (dp4a) on the nibbles as they are: with q4 * scale + offset - 128 the weight of level 1,
sum w * x = scale * sum q4 * x + (offset - 128) * sum x, in int32, so exactly what the tensor cores
of the other forms give. Those would spend eight columns on one token.

A matrix of 16 MB takes 3.5 us to read, as long as a launch and the steps before the first product
take together. So weights are under way to shared memory before the kernel before has ended
(programmatic dependent launch), and every block turns the token into integers itself while they
arrive: that saves a kernel, and its launch.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qoqc.codegen.kernels.few_steps import (
    SLOTS,
    channels,
    finish,
    part_layout,
    products,
    start_step,
    weight_layout,
)
from qoqc.codegen.kernels.few_token import normed, words_of


@gluon.jit(do_not_specialize=["early", "steps"])
def few_linear_kernel(
    x_ptr,  # [M, K]
    x_stride,
    norm_residual_ptr,  # [M, K], read if HAS_NORM_RESIDUAL
    norm_residual_stride,
    norm_weight_ptr,  # [K], read if HAS_NORM_WEIGHT
    norm_bias_ptr,  # [K], read if HAS_NORM_BIAS
    w_ptr,  # [N/128, K/128, 128, 16] int32: packed tiles, both rounded up
    word_ptr,  # [K/128, N] int32 group words, or [N] int32 channel zeros
    channel_scale_ptr,  # [N] fp32
    bias_ptr,  # [N], read if HAS_BIAS
    residual_ptr,  # [M, N], read if HAS_RESIDUAL
    y_ptr,  # [M, N], [M, N / 2] if GLU
    total_ptr,  # [M, K], written if HAS_NORM_RESIDUAL
    normed_ptr,  # [M, K], written if KEEP
    early,  # 1: the kernel before does not write weights, start on them while it ends; 0: wait
    steps,  # N / ROWS, rounded up
    N: gl.constexpr,
    K: gl.constexpr,
    GROUPED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    GLU: gl.constexpr,
    NORMED: gl.constexpr,
    EPS: gl.constexpr,
    OFFSET: gl.constexpr,
    CENTRED: gl.constexpr,
    ROUND_FIRST: gl.constexpr,
    HAS_NORM_RESIDUAL: gl.constexpr,
    HAS_NORM_WEIGHT: gl.constexpr,
    HAS_NORM_BIAS: gl.constexpr,
    KEEP: gl.constexpr,
    BLOCK_K: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    WARPS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """Steps program_id(0), program_id(0) + programs, ... of token program_id(1)."""
    TILES: gl.constexpr = BLOCK_K // 128
    K_TILES: gl.constexpr = (K + 127) // 128
    WAYS: gl.constexpr = WARPS * 8 // min(ROWS, 8)
    W: gl.constexpr = weight_layout(ROWS, WARPS)
    P: gl.constexpr = part_layout(ROWS, WARPS, WAYS)
    KIND: gl.constexpr = x_ptr.dtype.element_ty
    flat4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    flat2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    w_buffers = gl.allocate_shared_memory(gl.int32, [DEPTH, TILES, ROWS, 4, 4], flat4)
    word_buffers = w_buffers
    if GROUPED:
        word_buffers = gl.allocate_shared_memory(gl.int32, [DEPTH, TILES, ROWS], flat2)
    parts = gl.allocate_shared_memory(gl.int32, [SLOTS, WAYS, ROWS, 4], flat3)
    blocks = gl.num_programs(0)
    step = gl.program_id(0)
    if DEPENDENT:  # noqa: SIM102  decided when compiled, the other when run
        if early == 0:
            gdc_wait()
    # one step only: more would stand in the way of the token
    start_step(
        step, steps, w_ptr, word_ptr, w_buffers.index(0), word_buffers.index(0),
        N, K_TILES, TILES, GROUPED, ROWS, W, WARPS,
    )  # fmt: skip
    X: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [1, WARPS], [1, 0])
    k = gl.expand_dims(gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, X)), 0)
    in_k = k < K
    norm_weight = k
    norm_bias = k
    if HAS_NORM_WEIGHT:
        norm_weight = gl.load(norm_weight_ptr + k, mask=in_k, other=0.0)
    if HAS_NORM_BIAS:
        norm_bias = gl.load(norm_bias_ptr + k, mask=in_k, other=0.0)
    if DEPENDENT:
        gdc_wait()
    token = gl.program_id(1).to(gl.int64)
    x = gl.load(x_ptr + token * x_stride + k, mask=in_k, other=0.0).to(gl.float32)
    if HAS_NORM_RESIDUAL:
        more = norm_residual_ptr + token * norm_residual_stride + k
        x += gl.load(more, mask=in_k, other=0.0).to(gl.float32)
        x = x.to(KIND).to(gl.float32)
    for i in gl.static_range(1, DEPTH):
        start_step(
            step + i * blocks, steps, w_ptr, word_ptr, w_buffers.index(i), word_buffers.index(i),
            N, K_TILES, TILES, GROUPED, ROWS, W, WARPS,
        )  # fmt: skip
    if DEPENDENT:
        gdc_launch_dependents()
    is_first = gl.program_id(0) == 0
    if HAS_NORM_RESIDUAL:
        gl.store(total_ptr + token * K + k, x.to(KIND), mask=in_k & is_first)
    if NORMED:
        x = normed(
            x, norm_weight, norm_bias, in_k,
            KIND, K, EPS, OFFSET, CENTRED, ROUND_FIRST, HAS_NORM_WEIGHT, HAS_NORM_BIAS,
        )  # fmt: skip
        if KEEP:
            gl.store(normed_ptr + token * K + k, x.to(KIND), mask=in_k & is_first)
    low, high, sums, token_scale, token_sum = words_of(x, BLOCK_K, W)
    stage = 0
    while step < steps:
        count = gl.minimum(SLOTS, (steps - step + blocks - 1) // blocks)
        channel, live = channels(step, count, N, ROWS, P)
        channel_scale = gl.load(channel_scale_ptr + channel, mask=live, other=0.0)
        # stand-ins where there are none
        zero = channel
        bias = channel_scale
        residual = channel_scale
        if not GROUPED:
            zero = gl.load(word_ptr + channel, mask=live, other=0)
        if HAS_BIAS:
            bias = gl.load(bias_ptr + channel, mask=live, other=0.0).to(gl.float32)
        if HAS_RESIDUAL:
            there = residual_ptr + token * N + channel
            residual = gl.load(there, mask=live, other=0.0).to(gl.float32)
        for slot in range(count):
            async_copy.wait_group(DEPTH - 1)
            weights = w_buffers.index(stage).load(W)
            words = stage
            if GROUPED:
                words = word_buffers.index(stage).load(gl.SliceLayout(2, gl.SliceLayout(3, W)))
            part = products(weights, words, low, high, sums, GROUPED, ROWS, WAYS, W)
            parts.index(slot).store(part)
            start_step(
                step + (slot + DEPTH) * blocks, steps, w_ptr, word_ptr,
                w_buffers.index(stage), word_buffers.index(stage),
                N, K_TILES, TILES, GROUPED, ROWS, W, WARPS,
            )  # fmt: skip
            stage += 1
            if stage == DEPTH:
                stage = 0
        scales = (token_scale, token_sum, channel_scale, zero, bias, residual)
        finish(
            parts, step, count, token, scales, y_ptr,
            N, GROUPED, HAS_BIAS, HAS_RESIDUAL, GLU, ROWS, P,
        )  # fmt: skip
        step += SLOTS * blocks
