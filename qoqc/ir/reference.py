"""The definition of the quantized linear in plain torch, for any device.

Kernels are held against it. Integer results are exact. It goes through a real int8 GEMM on CPU, so
this is also the path a CPU machine runs. What touches the KV cache is defined in kv_reference.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from qoqc.quant.glu import apart

EXACT_K = 1024
"""Summands of int8 products that fp32 adds exactly: 1024 * 127 * 128 < 2**24."""


def integer_matmul(xq: torch.Tensor, w8: torch.Tensor) -> torch.Tensor:
    """`xq @ w8.T` of int8 [M, K] and int8 [N, K] as exact int32 [M, N]."""
    if 0 in xq.shape or 0 in w8.shape:
        return torch.zeros(xq.shape[0], w8.shape[0], dtype=torch.int32, device=xq.device)
    if xq.device.type == "cpu":
        # torch's int8 GEMM is wrong where the inner size is 1 ...
        if xq.shape[1] == 1 or not int8_gemm_is_usable():
            return chunked_matmul(xq, w8)
        # ... and for a single row with a stride below its length, which torch calls contiguous
        rows = xq.contiguous().as_strided(xq.shape, (xq.shape[1], 1))
        return torch._int_mm(rows, w8.t())
    # every product and sum stays below 2**53, so fp64 is exact on devices without an int8 GEMM
    return (xq.double() @ w8.double().t()).int()


def chunked_matmul(xq: torch.Tensor, w8: torch.Tensor) -> torch.Tensor:
    """`integer_matmul` through fp32 GEMMs short enough to be exact, for CPUs without VNNI."""
    acc = torch.zeros(xq.shape[0], w8.shape[0], dtype=torch.int32, device=xq.device)
    for first in range(0, xq.shape[1], EXACT_K):
        chunk = slice(first, first + EXACT_K)
        acc += (xq[:, chunk].float() @ w8[:, chunk].float().t()).int()
    return acc


@functools.cache
def int8_gemm_is_usable() -> bool:
    """Whether `torch._int_mm` is fast and exact on this CPU.

    Without AVX512-VNNI torch runs a scalar loop (22x slower than `chunked_matmul` at M=128,
    N=K=2048), and where ONEDNN_MAX_CPU_ISA hides VNNI from oneDNN its sums saturate at 16 bit.
    """
    if not torch.cpu._is_vnni_supported():
        return False
    probe = torch.full((64, 128), 127, dtype=torch.int8)
    return all(
        bool((torch._int_mm(probe[:rows], probe.t()) == 127 * 127 * 128).all()) for rows in (1, 64)
    )


def int8_linear(
    xq: torch.Tensor,
    token_scale: torch.Tensor,
    w8: torch.Tensor,
    channel_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    matmul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = integer_matmul,
) -> torch.Tensor:
    """Integer GEMM and epilogue: xq int8 [..., K], w8 int8 [N, K] -> dtype [..., N].

    The epilogue is fp32, in this order: `acc * channel_scale * token_scale + bias + residual`.
    `matmul` is given where this function is traced: the op with integer_matmul behind it.
    """
    flat = xq.reshape(token_scale.numel(), xq.shape[-1])
    y = matmul(flat, w8).float()
    y.mul_(channel_scale).mul_(token_scale.reshape(-1, 1))
    if bias is not None:
        y.add_(bias.float())
    if residual is not None:
        y.add_(residual.reshape(y.shape).float())
    return y.to(dtype).view(*xq.shape[:-1], w8.shape[0])


def int8_glu(
    xq: torch.Tensor,
    token_scale: torch.Tensor,
    w8: torch.Tensor,
    channel_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    matmul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = integer_matmul,
) -> torch.Tensor:
    """silu(gate) * up of an int8_linear whose rows are gate and up in turn: dtype [..., N / 2].

    gate, up and silu(gate) are rounded to `dtype`, as between the ops of a model.
    """
    gate, up = apart(int8_linear(xq, token_scale, w8, channel_scale, bias, None, dtype, matmul))
    return torch.nn.functional.silu(gate) * up
