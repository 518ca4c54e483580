"""The definition of what stands between a projection and the cache: head norm, then rotation.

A model rotates its queries and keys by position (RoFormer, arXiv 2104.09864), some after an RMSNorm
over each head. What a graph computes cosines and sines from (YaRN, llama3, dynamic scaling) is its
own affair: they are inputs here, one value per position and rotated channel.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from qoqc.ir.glue import norm

RotaryForm = Literal["none", "half", "interleaved"]
"""Which channels turn together, of R rotated ones: c and c + R / 2, or 2c and 2c + 1."""

ROTARY_FORMS: tuple[str, ...] = get_args(RotaryForm)


def partner(x: Tensor, form: str) -> Tensor:
    """What `x` [..., R] meets under the sine: -x of the second channel, x of the first."""
    if form == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((-second, first), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, form: str) -> Tensor:
    """`x` [B, H, S, D] turned by position: x * cos + partner(x) * sin in fp32, then x's dtype.

    cos, sin  [B or 1, S, R] for the first R <= D channels; the others stay as they are
    """
    if form == "none":
        return x
    width = cos.shape[-1]
    turned = x[..., :width].float()
    cosines, sines = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    turned = turned * cosines + partner(turned, form) * sines
    return torch.cat((turned.to(x.dtype), x[..., width:]), dim=-1)


def prepare(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    form: str,
    eps: float,
    offset: float,
    round_first: bool,
) -> Tensor:
    """Queries or keys [B, H, S, D] as attention reads them: normed over D if `weight`, then turned.

    weight  [D], with eps, offset and round_first as in `glue.norm` of the kind "rms"
    """
    if weight is not None:
        x = norm(x, weight, None, "rms", eps, offset, round_first)
    if form == "none" or cos is None or sin is None:
        return x
    return rotate(x, cos, sin, form)
