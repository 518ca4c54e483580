"""Tokens as kernels that go over whole ones address them: rows that lie a fixed stride apart."""

from __future__ import annotations

import torch


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tokens of `x` [..., K] in row-major order, channels side by side, and their stride.

    A contiguous `x` comes back as it is, in its own shape: kernels take an address, and to make a
    view takes as long as all else on the way to a launch. Of other strides a view, else a copy.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return flat, flat.stride(0)


def empty_quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for what tokens [..., K] become, contiguous on the device of `x`.

    xq int8 [..., K], token_scale fp32 [...] and token_sum int32 [...].
    """
    scale = torch.empty(tuple(x.shape[:-1]), dtype=torch.float32, device=x.device)
    return empty_like(x, torch.int8), scale, empty_like(scale, torch.int32)


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for a contiguous tensor of the shape of `x`: in half the time of torch.empty."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
