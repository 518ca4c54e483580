"""The definition of the fused glue between linears: a norm or an activation, then quantization.

In plain torch, in the order and the dtypes of the ops that a model writes, so that a graph that
calls these gives the bits of the graph it was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from qoqc.quant.activation import quantize_act

NormKind = Literal["rms", "centred", "layer"]
"""rms: x / rms(x). centred: the same of x - mean(x). layer: torch's layer_norm, in its order."""

ActKind = Literal["silu", "gelu", "gelu_tanh", "relu"]

NORM_KINDS: tuple[str, ...] = get_args(NormKind)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    round_first: bool,
) -> Tensor:
    """Normalize `x` [..., K] over its last axis, in fp32; weight, bias [K]; dtype of `x`.

    round_first  multiply by `weight` after rounding to the dtype of `x` (Llama), not before
    offset       what is added to `weight` in fp32 (Gemma: 1); 0 under `round_first` and for "layer"

    A bias is for "layer" only.
    """
    if kind == "layer":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    xf = x.float()
    if kind == "centred":
        xf = xf - xf.mean(-1, keepdim=True)
    unit = xf * torch.rsqrt(xf.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return unit.to(x.dtype)
    if round_first:
        return weight * unit.to(x.dtype)
    factor = weight.float()
    if offset:
        factor = factor + offset
    return (unit * factor).to(x.dtype)


def norm_quant(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`norm` of `x` + `residual` [..., K], quantized per token (quant/activation.py).

    Returns xq int8 [..., K], token_scale fp32 [...], token_sum int32 [...], the sum `x` +
    `residual` in the dtype of `x` (what the next residual addition reads) and, if `keep`, the
    normalized value; both are empty where there is no residual or `keep` is False.
    """
    total = x if residual is None else x + residual
    normed = norm(total, weight, bias, kind, eps, offset, round_first)
    return (
        *quantize_act(normed),
        x.new_empty(0) if residual is None else total.contiguous(),
        normed.contiguous() if keep else x.new_empty(0),
    )


def act_quant(gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """activation(`gate`) (* `up`) [..., K], quantized per token: as quantize_act returns it.

    The activation is rounded to the dtype of `gate` before the product, as between two ops.
    """
    act = ACTIVATIONS[kind](gate)
    return quantize_act(act if up is None else act * up)


def linear_glu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up [..., N / 2] of a linear whose first N / 2 channels are the gate.

    weight [N, K], bias [N]. What the pass fuse_glu writes until the linear pass quantizes it.
    """
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return F.silu(gate) * up
