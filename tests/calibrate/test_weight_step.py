"""The weight step as a whole: better than rounding, exact to the bit, the control unchanged."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqc.calibrate.hessian import Hessian
from qoqc.calibrate.ranges import plain_grid
from qoqc.calibrate.weight_step import WeightOptions, output_error, quantize_linear, refit
from qoqc.errors import OptionError, Unsupported
from qoqc.quant.pack import pack_nibbles, unpack_nibbles
from qoqc.quant.weight import (
    PackedWeight,
    concat_rows,
    dequantize_weight,
    expand_int8,
    quantize_weight,
    rows,
)

SETTINGS = settings(deadline=None, max_examples=15)
Format = Literal[128, -1]
FORMATS: tuple[Format, ...] = (128, -1)
both_formats = pytest.mark.parametrize("group_size", FORMATS)


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    return w * (1 + 2 * (torch.rand(n, k, generator=generator) > 0.99))


def hessian(k: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    """Of tokens whose channels mix and differ in size by up to 100 times."""
    generator = torch.Generator().manual_seed(seed + 99)
    mix = torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(tokens or 4 * k, k, generator=generator) @ mix
    found = Hessian(k, "a")
    found.add(x * torch.logspace(-1, 1, k)[torch.randperm(k, generator=generator)])
    return found.matrix()


def assert_same(a: PackedWeight, b: PackedWeight) -> None:
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


def assert_within_the_protective_range(packed: PackedWeight) -> None:
    if packed.group_word is None:
        assert packed.channel_zero is not None
        assert bool(((packed.channel_zero >= 0) & (packed.channel_zero <= 15)).all())
        return
    scale, shifted = packed.group_word & 255, packed.group_word >> 8  # 128 - zero * scale
    zero_scaled = 128 - shifted
    assert bool(((scale >= 1) & (scale <= 16)).all())
    assert bool((zero_scaled % scale == 0).all())
    assert bool(((zero_scaled >= 0) & (zero_scaled <= 128)).all())
    assert bool((15 * scale - zero_scaled <= 127).all())


@given(
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    group_size=st.sampled_from(FORMATS),
    act_order=st.booleans(),
    clip=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
@SETTINGS
def test_every_output_can_be_stored_exactly(
    n: int, k: int, group_size: Format, act_order: bool, clip: bool, scale: float, seed: int
) -> None:
    w = weight(n, k, seed) * scale
    options = WeightOptions(group_size, act_order=act_order, clip=clip)
    packed = quantize_linear(w, hessian(k, seed), options, "a").packed
    assert packed.group_size == group_size
    assert (packed.out_features, packed.in_features) == (n, k)
    assert_within_the_protective_range(packed)
    whole = unpack_nibbles(packed.qweight, n, packed.qweight.shape[1] * 128)
    assert torch.equal(pack_nibbles(whole), packed.qweight)
    assert bool(torch.isfinite(packed.channel_scale).all())
    assert bool((packed.channel_scale > 0).all())
    # padding stands for exact zeros
    wide = dataclasses.replace(packed, in_features=packed.qweight.shape[1] * 128)
    if group_size == 128:
        assert not expand_int8(wide)[:, k:].any()
    else:
        assert not whole[:, k:].any()


@given(
    n=st.integers(16, 64),
    k=st.integers(64, 260),
    group_size=st.sampled_from(FORMATS),
    act_order=st.booleans(),
    clip=st.booleans(),
    seed=st.integers(0, 2**16),
)
@SETTINGS
def test_the_output_error_is_below_that_of_rounding(
    n: int, k: int, group_size: Format, act_order: bool, clip: bool, seed: int
) -> None:
    w, h = weight(n, k, seed), hessian(k, seed)
    options = WeightOptions(group_size, act_order=act_order, clip=clip)
    control = quantize_linear(w, h, WeightOptions(group_size, "rtn"), "a")
    found = quantize_linear(w, h, options, "a")
    assert found.error is not None
    assert control.error is not None
    assert found.error < control.error


@both_formats
def test_each_part_adds_to_the_whole(group_size: Format) -> None:
    w, h = weight(96, 384), hessian(384)

    def error(**options: Any) -> float:
        found = quantize_linear(w, h, WeightOptions(group_size, **options), "a").error
        assert found is not None
        return found

    off = {"clip": False, "refit": False, "act_order": False, "passes": 0}
    plain = error(**off)
    for part in ({"clip": True}, {"refit": True}, {"act_order": True}, {"passes": 1}):
        assert error(**{**off, **part}) < plain, part
    assert error(**off | {"passes": 3}) < error(**off | {"passes": 1})
    assert error() < 0.8 * plain
    assert plain < 0.8 * error(method="rtn")


def test_the_reported_error_is_that_of_outputs_on_the_tokens() -> None:
    x = torch.randn(500, 200, generator=torch.Generator().manual_seed(5))
    w, seen = weight(24, 200), Hessian(200, "a")
    seen.add(x)
    found = quantize_linear(w, seen.matrix(), WeightOptions(), "a")
    y = x.double() @ w.double().t()
    noise = x.double() @ dequantize_weight(found.packed).double().t() - y
    assert found.error == pytest.approx(float(noise.square().sum() / y.square().sum()), rel=1e-4)


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rtn_is_quantize_weight_bit_for_bit(group_size: Format, dtype: torch.dtype) -> None:
    w = weight(150, 300).to(dtype)
    for h in (None, hessian(300)):
        found = quantize_linear(w, h, WeightOptions(group_size, "rtn"), "a")
        assert_same(found.packed, quantize_weight(w, group_size))
        assert (found.error is None) == (h is None)


@both_formats
def test_the_same_arguments_give_the_same_bits(group_size: Format) -> None:
    w, h = weight(70, 260), hessian(260)
    first = quantize_linear(w, h, WeightOptions(group_size), "a")
    assert_same(first.packed, quantize_linear(w, h, WeightOptions(group_size), "b").packed)


@both_formats
def test_bf16_weights_count_as_their_fp32_values(group_size: Format) -> None:
    w, h = weight(20, 130).bfloat16(), hessian(130)
    a = quantize_linear(w, h, WeightOptions(group_size), "a")
    assert_same(a.packed, quantize_linear(w.float(), h, WeightOptions(group_size), "a").packed)


@both_formats
def test_a_stack_of_linears_splits_into_their_rows(group_size: Format) -> None:
    h = hessian(200)
    parts = [weight(n, 200, n) for n in (128, 40, 60)]
    stack = quantize_linear(torch.cat(parts), h, WeightOptions(group_size), "qkv").packed
    split = [rows(stack, 0, 128), rows(stack, 128, 168), rows(stack, 168, 228)]
    assert_same(concat_rows(split), stack)
    for w, piece in zip(parts, split, strict=True):
        alone = quantize_linear(w, h, WeightOptions(group_size), "a").error
        assert output_error(w, piece, h) == pytest.approx(alone, rel=0.02)  # near ties may differ


def test_refit_is_the_least_squares_scale() -> None:
    w, h = weight(10, 100), hessian(100)
    grid = plain_grid(w, 128)
    codes = grid.nearest(w)
    best = refit(w, grid, codes, h)
    before, after = (output_error(w, g.pack(codes), h) for g in (grid, best))
    assert after < before
    for factor in (0.99, 1.01):
        moved = dataclasses.replace(best, channel_scale=best.channel_scale * factor)
        assert output_error(w, moved.pack(codes), h) > after


def test_refit_leaves_a_channel_it_cannot_improve() -> None:
    w, h = weight(3, 64), hessian(64)
    w[1] = 0
    grid = plain_grid(w, 128)
    codes = grid.nearest(w)
    codes[2] = grid.zero[2].to(torch.uint8)  # all weights zero: any scale is as good
    best = refit(w, grid, codes, h)
    assert torch.equal(best.channel_scale[1:], grid.channel_scale[1:])
    assert not torch.equal(best.channel_scale[:1], grid.channel_scale[:1])


@both_formats
@pytest.mark.parametrize(("n", "k"), [(0, 64), (1, 1), (3, 0), (128, 128)])
def test_tiny_and_empty_shapes(group_size: Format, n: int, k: int) -> None:
    h = torch.eye(k)
    found = quantize_linear(weight(n, k), h, WeightOptions(group_size), "a")
    assert dequantize_weight(found.packed).shape == (n, k)


@both_formats
def test_a_zero_weight_and_a_zero_channel_stay_zero(group_size: Format) -> None:
    w = weight(5, 140)
    w[3] = 0
    h = hessian(140)
    assert not dequantize_weight(quantize_linear(w, h, WeightOptions(group_size), "a").packed)[
        3
    ].any()
    found = quantize_linear(w * 0, h, WeightOptions(group_size), "a")
    assert not dequantize_weight(found.packed).any()
    assert found.error == 0


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    method: Literal["rtn", "gptq"], bad: float
) -> None:
    w = weight(4, 20)
    w[1, 2] = bad
    with pytest.raises(Unsupported, match=r"layers\.0\.q_proj: the weight holds NaN or infinity"):
        quantize_linear(w, hessian(20), WeightOptions(method=method), "layers.0.q_proj")


def test_hessians_that_do_not_fit_are_named() -> None:
    w = weight(4, 20)
    with pytest.raises(ValueError, match=r"up_proj: a Hessian of shape \(21, 21\) for 20 inputs"):
        quantize_linear(w, hessian(21), WeightOptions(), "up_proj")
    with pytest.raises(ValueError, match="up_proj: gptq needs the Hessian"):
        quantize_linear(w, None, WeightOptions(), "up_proj")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 64}, "group_size=64"),
        ({"method": "awq"}, "method='awq'"),
        ({"passes": -1}, "passes=-1"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": float("nan")}, "damping=nan"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        WeightOptions(**options)
