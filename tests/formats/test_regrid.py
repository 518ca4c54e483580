"""The two-level grid next to a source's: exact where it can be, legal always, near otherwise."""

from __future__ import annotations

import pytest
import torch

from qoqc.formats.regrid import regrid
from qoqc.formats.source import relative_rms
from qoqc.quant.pack import unpack_nibbles
from qoqc.quant.weight import PackedWeight, dequantize_weight, expand_int8, quantize_weight

N, GROUPS = 48, 4
K = 128 * GROUPS


def source(symmetric: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal weights on the grid of a 16-bit scale per group, and the scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, GROUPS, 128, generator=generator)
    weight *= torch.rand(N, GROUPS, 1, generator=generator) + 0.3
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if symmetric:
        scale = (weight.abs().amax(-1, keepdim=True) / 7.5).half().float()
        zero = torch.full_like(scale, 8)
    else:
        scale = ((high - low) / 15).half().float()
        zero = (-low / scale).round()
    codes = ((weight / scale).round() + zero).clamp(0, 15)
    return ((codes - zero) * scale).view(N, K), scale[..., 0]


def require_legal(packed: PackedWeight) -> None:
    """What the kernels' byte-wise dequantization needs, and what it gives."""
    assert packed.group_word is not None
    scale, product = packed.group_word & 255, 128 - (packed.group_word >> 8)
    assert ((scale >= 1) & (scale <= 16)).all()
    assert ((product >= 0) & (product % scale == 0) & (product <= 128)).all()
    assert (15 * scale - product <= 127).all()
    n, k = packed.out_features, packed.in_features
    codes = unpack_nibbles(packed.qweight, n, k).view(n, -1, 128).int()
    wide = codes * scale.t()[..., None] - product.t()[..., None]
    assert torch.equal(expand_int8(packed).int(), wide.view(n, k))


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_nearer_than_rounding_anew(symmetric: bool) -> None:
    values, scale = source(symmetric)
    packed = regrid(values, scale)
    require_legal(packed)
    error = relative_rms(dequantize_weight(packed), values)
    anew = relative_rms(dequantize_weight(quantize_weight(values, 128)), values)
    assert error < 0.04
    assert error < (anew / 2 if symmetric else anew)


def test_one_scale_per_channel_is_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(N, 1, generator=generator).half().float().expand(N, GROUPS)
    whole = torch.randint(-8, 8, (N, K), generator=generator)
    values = whole * scale[:, :1]
    packed = regrid(values, scale)
    require_legal(packed)
    assert torch.equal(dequantize_weight(packed), values)


def test_scales_in_whole_ratios_are_exact() -> None:
    generator = torch.Generator().manual_seed(2)
    ratio = torch.randint(1, 17, (N, GROUPS), generator=generator)
    ratio[:, 0] = 16
    whole = torch.randint(-8, 8, (N, GROUPS, 128), generator=generator)
    whole[..., 0] = -8  # so that 16 is the most the first group can take
    scale = ratio * 2.0**-9
    values = (whole * scale[..., None]).view(N, K)
    packed = regrid(values, scale)
    require_legal(packed)
    assert torch.equal(dequantize_weight(packed), values)


def test_the_channel_scale_is_searched_for() -> None:
    generator = torch.Generator().manual_seed(5)
    ratio = torch.randint(3, 12, (N, GROUPS), generator=generator)
    ratio[:, 0] = 11  # 16 for the largest would make the others 16/11 of whole numbers
    whole = torch.randint(-8, 8, (N, GROUPS, 128), generator=generator)
    scale = ratio * 2.0**-9
    values = (whole * scale[..., None]).view(N, K)
    # 93/64, which is tried, is 0.1 % from 16/11
    assert relative_rms(dequantize_weight(regrid(values, scale)), values) < 0.002


@pytest.mark.parametrize("low, high", [(0, 15), (-15, 0), (-3, 12), (-12, 3), (0, 0)])
def test_lopsided_groups_stay_within_int8(low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(low, high + 1, (N, GROUPS, 128), generator=generator)
    whole[..., 0], whole[..., 1] = low, high
    scale = torch.full((N, GROUPS), 0.25)
    values = (whole * scale[..., None]).view(N, K)
    packed = regrid(values, scale)
    require_legal(packed)
    # one scale for all: its group_scale is the largest that keeps them in int8, and divides it
    got = dequantize_weight(packed)
    assert torch.allclose(got, values, rtol=2**-22, atol=0)


def test_zeros_and_negative_scales() -> None:
    values, scale = source(symmetric=True)
    values[3], scale[3] = 0, 0
    values.view(N, GROUPS, 128)[4, 1], scale[4, 1] = 0, 0
    packed = regrid(values, scale)
    require_legal(packed)
    got = dequantize_weight(packed)
    assert not got[3].any()
    assert not got.view(N, GROUPS, 128)[4, 1].any()
    assert torch.isfinite(got).all()
    again = regrid(values, -scale)
    assert torch.equal(dequantize_weight(again), got)
