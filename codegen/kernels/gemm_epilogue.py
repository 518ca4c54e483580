"""The epilogue that the Triton forms of the GEMM share: from int32 sums to y."""

from __future__ import annotations

import triton
import triton.language as tl

from qoqc.codegen.kernels.pieces import rounded


@triton.jit
def finish(
    acc,  # [BLOCK_N, BLOCK_M] int32
    token_scale_ptr,
    token_sum_ptr,
    channel_scale_ptr,
    zero_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    first_m,  # int64
    first_n,
    M,
    N: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GLU: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scale, add, round and store, in the order of the reference (reference.int8_linear)."""
    in_block_m = tl.arange(0, BLOCK_M)
    in_m = in_block_m < M - first_m
    offs_n = first_n + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    if not GROUPED:
        # sum (q4 - zero) * x = sum q4 * x - zero * sum x
        zero = tl.load(zero_ptr + offs_n, mask=in_n, other=0)
        token_sum = tl.load(token_sum_ptr + first_m + in_block_m, mask=in_m, other=0)
        acc -= zero[:, None] * token_sum[None, :]
    channel_scale = tl.load(channel_scale_ptr + offs_n, mask=in_n, other=0.0)
    token_scale = tl.load(token_scale_ptr + first_m + in_block_m, mask=in_m, other=0.0)
    y = acc.to(tl.float32) * channel_scale[:, None] * token_scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=in_n, other=0.0)
        y += bias.to(tl.float32)[:, None]
    kind: tl.constexpr = y_ptr.dtype.element_ty
    if GLU:
        y = silu_product(y, kind, ROUND_BF16, BLOCK_M, BLOCK_N)
        half = first_n // 2 + tl.arange(0, BLOCK_N // 2)
        inside = (half < N // 2)[:, None] & in_m[None, :]
        offs_y = in_block_m[None, :] * (N // 2) + half[:, None]
        y_ptr += first_m * (N // 2)
    else:
        inside = in_n[:, None] & in_m[None, :]
        offs_y = in_block_m[None, :] * N + offs_n[:, None]  # [BLOCK_N, BLOCK_M]
        y_ptr += first_m * N
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + first_m * N + offs_y, mask=inside, other=0.0)
            y += residual.to(tl.float32)
    tl.store(y_ptr + offs_y, rounded(y, kind, ROUND_BF16).to(kind), mask=inside)


@triton.jit
def silu_product(
    y, KIND: tl.constexpr, ROUND_BF16: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """silu(gate) * up of rows that are eight of gate and eight of up in turn (quant/glu.py).

    gate, up and silu(gate) are rounded to KIND as the model rounds them between its ops.
    """
    y = rounded(y, KIND, ROUND_BF16)
    pairs = tl.permute(tl.reshape(y, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    act = rounded(gate / (1.0 + tl.exp(-gate)), KIND, ROUND_BF16)
    return tl.reshape(act * up, (BLOCK_N // 2, BLOCK_M))
