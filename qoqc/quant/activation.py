"""Per-token symmetric int8 activations."""

from __future__ import annotations

import torch

TINY_TOKEN = 2.0**-100
"""A token whose largest |x| is below this quantizes to zeros: 127 / absmax must stay finite."""


def quantize_act(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize `x` float [..., K] per token (QServe paper, section 4.1; round half to even).

    Returns xq int8 [..., K], token_scale fp32 [...] = absmax / 127, and token_sum int32 [...], the
    sum of the integers, which the per-channel format folds its zero point out with. An all-zero
    token gives zeros; a token with NaN or infinity gives a NaN scale, so its output row is NaN.
    """
    xf = x.contiguous().float()
    absmax = xf.abs().amax(-1) if x.shape[-1] else xf.new_zeros(x.shape[:-1])
    finite = absmax < torch.inf
    live = finite & (absmax >= TINY_TOKEN)
    inverse = torch.where(live, 127.0 / absmax, 0.0)
    product = torch.where(finite[..., None], xf, 0.0) * inverse[..., None]
    xq = product.round_().clamp_(-127, 127).to(torch.int8)
    # by a tensor: CUDA divides by a scalar through its reciprocal, which rounds differently
    step = absmax / torch.full_like(absmax, 127.0)
    scale = torch.where(live, step, torch.where(finite, 0.0, torch.nan))
    return xq, scale, xq.sum(-1, dtype=torch.int32)
