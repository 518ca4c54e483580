"""From a grid with a 16-bit scale per group to the nearest two-level one.

A source's weight is m * scale with whole m, at most 15 apart in a group. Ours is m times a whole
group_scale times channel_scale: the same m, if group_scale * channel_scale comes near to scale.
Rounding the values anew instead would put a grid of our own choice across the source's, which for
symmetric sources (whose codes rarely reach both ends) costs several times the error.
"""

from __future__ import annotations

import torch

from qoqc.ir.spec import GROUP
from qoqc.quant.pack import pack_nibbles
from qoqc.quant.weight import PackedWeight

MAX_GROUP_SCALE = 16
"""Of level 2 (quant/weight.py)."""

FACTORS = 65
"""Channel scales tried: from the finest, whose largest group_scale is 16, to twice that."""


def regrid(values: torch.Tensor, scale: torch.Tensor) -> PackedWeight:
    """Pack `values` fp32 [N, K], whole multiples of `scale` fp32 [N, K/128] per group of 128.

    Of FACTORS channel scales each channel takes the one with the least squared error; then every
    weight takes the nearest code, which may still lower it.
    """
    n, k = values.shape
    groups = values.view(n, k // GROUP, GROUP)
    magnitude = scale.abs()
    whole = (groups / torch.where(magnitude > 0, magnitude, 1.0)[..., None]).round_()
    low, high = whole.amin(-1).clamp_(max=0), whole.amax(-1).clamp_(min=0)
    # int8 must hold whole * group_scale
    limit = torch.minimum(128 // (-low).clamp(min=1), 127 // high.clamp(min=1))
    limit.clamp_(max=MAX_GROUP_SCALE)
    channel_scale = _best_channel_scale(magnitude, limit, whole.square().sum(-1))
    step = torch.where(channel_scale > 0, channel_scale, 1.0)[:, None]
    group_scale = _group_scale(magnitude, step, limit)
    # any zero from -low on will do; the dequantization wants it within these bounds
    zero = torch.minimum(torch.maximum(-low, 15 - 127 // group_scale), 128 // group_scale)
    codes = (groups / (step * group_scale)[..., None]).round_().add_(zero[..., None]).clamp_(0, 15)
    packed = pack_nibbles(codes.to(torch.uint8).view(n, k))
    whole_scale, whole_zero = group_scale.int(), zero.int()
    word = whole_scale | ((128 - whole_zero * whole_scale) << 8)
    return PackedWeight(packed, channel_scale, word.t().contiguous(), None, n, k)


def _group_scale(
    scale: torch.Tensor, channel_scale: torch.Tensor, limit: torch.Tensor
) -> torch.Tensor:
    """The whole group scales, as floats: within 1 and `limit`."""
    return torch.minimum((scale / channel_scale).round_().clamp_(min=1), limit)


def _best_channel_scale(
    scale: torch.Tensor, limit: torch.Tensor, squares: torch.Tensor
) -> torch.Tensor:
    """fp32 [N]; squares [N, G] are the sums of m * m, by which a group's error counts."""
    finest = (scale / limit).amax(1, keepdim=True)
    best, least = finest.clone(), torch.full_like(finest, torch.inf)
    for index in range(FACTORS):
        tried = finest * (1 + index / (FACTORS - 1))
        step = torch.where(tried > 0, tried, 1.0)
        moved = _group_scale(scale, step, limit) * step - scale
        error = (moved.square() * squares).sum(1, keepdim=True)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best[:, 0].contiguous()
