"""Weight formats: the level-2 grid by brute force, error bounds, edge shapes, row surgery."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqc.errors import Unsupported
from qoqc.quant.pack import unpack_nibbles
from qoqc.quant.weight import (
    PackedWeight,
    concat_rows,
    dequantize_weight,
    expand_int8,
    group_grid,
    quantize_weight,
    rows,
)

SETTINGS = settings(deadline=None, max_examples=20)
Format = Literal[128, -1]
FORMATS: tuple[Format, ...] = (128, -1)
both_formats = pytest.mark.parametrize("group_size", FORMATS)


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def ranges() -> tuple[torch.Tensor, torch.Tensor]:
    """Every (min, max) pair within the protective range, as two float vectors."""
    low, high = torch.cartesian_prod(torch.arange(-119.0, 120), torch.arange(-119.0, 120)).T
    return low[low <= high], high[low <= high]


def words(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return scale.int() | ((128 - zero.int() * scale.int()) << 8)


def assert_same(a: PackedWeight, b: PackedWeight) -> None:
    assert a.tensors().keys() == b.tensors().keys()
    assert (a.out_features, a.in_features) == (b.out_features, b.in_features)
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name
        assert tensor.dtype == b.tensors()[name].dtype, name


# the level-2 grid


def test_every_range_keeps_the_exactness_conditions() -> None:
    scale, zero = group_grid(*ranges())
    assert bool((zero * scale <= 128).all())
    assert bool(((15 - zero) * scale <= 127).all())
    assert bool(((scale >= 1) & (scale <= 16)).all())
    assert bool(((zero >= 0) & (zero <= 15)).all())
    assert torch.equal(scale, scale.round())
    assert torch.equal(zero, zero.round())


def test_the_word_form_equals_the_plain_one_for_every_range_and_code() -> None:
    scale, zero = group_grid(*ranges())
    word = words(scale, zero)
    s, a = (word & 255)[:, None], (word >> 8)[:, None]
    q = torch.arange(16)
    byte = ((q * s + a) & 0xFF) ^ 0x80
    plain = (q - zero.int()[:, None]) * scale.int()[:, None]
    assert torch.equal(byte.to(torch.uint8).view(torch.int8).int(), plain)
    # no carry leaves a byte, so four lanes fit one 32-bit multiply-add
    assert int((q * s + a).max()) <= 255
    assert int((q * s + a).min()) >= 0


def test_every_range_error_is_half_a_step_inside_and_bounded_where_it_clips() -> None:
    low, high = ranges()
    scale, zero = (x[:, None] for x in group_grid(low, high))
    q = torch.arange(-119.0, 120)
    inside = (q >= low[:, None]) & (q <= high[:, None])
    code = torch.round(q / scale) + zero
    on_grid = inside & (code == code.clamp(0, 15))
    error = ((code.clamp(0, 15) - zero) * scale - q).abs()
    assert bool((error <= scale / 2)[on_grid].all())
    # a scale rounded down leaves up to 7 integers of the range, the zero up to half a step more
    assert bool((error <= scale / 2 + 7)[inside].all())


def test_zero_is_on_every_grid() -> None:
    # a padded channel, a pruned weight: code == zero stands for exactly 0 in any group
    scale, zero = group_grid(*ranges())
    assert bool(((zero - zero) * scale == 0).all())
    one_sided = group_grid(torch.tensor([40.0, -90.0]), torch.tensor([100.0, -20.0]))
    assert one_sided[1].tolist() == [0.0, 15.0]


@pytest.mark.parametrize(("low", "high"), [(-127.0, 127.0), (-128.0, 120.0)])
def test_a_range_that_cannot_be_exact_is_refused(low: float, high: float) -> None:
    with pytest.raises(Unsupported, match=r"\[-119, 119\]"):
        group_grid(torch.tensor([low]), torch.tensor([high]))


# error bounds


@given(
    n=st.integers(1, 140),
    k=st.integers(1, 400),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
@SETTINGS
def test_grouped_error_is_half_a_step_of_both_levels(
    n: int, k: int, scale: float, seed: int
) -> None:
    w = weight(n, k, seed) * scale
    packed = quantize_weight(w, 128)
    assert packed.group_word is not None
    step = (packed.group_word.t() & 255).repeat_interleave(128, 1)[:, :k].float()
    q4 = unpack_nibbles(packed.qweight, n, k)
    clipped = (q4 == 0) | (q4 == 15)
    bound = (step / 2 + 0.5 + 7 * clipped) * packed.channel_scale[:, None]
    error = (dequantize_weight(packed) - w).abs()
    assert bool((error <= bound * (1 + 1e-5)).all())


@given(
    n=st.integers(1, 140),
    k=st.integers(1, 400),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 2**16),
)
@SETTINGS
def test_per_channel_error_is_half_a_step(
    n: int, k: int, scale: float, shift: float, seed: int
) -> None:
    w = (weight(n, k, seed) + shift) * scale
    packed = quantize_weight(w, -1)
    error = (dequantize_weight(packed) - w).abs()
    assert bool((error <= packed.channel_scale[:, None] * 0.5 * (1 + 1e-5)).all())


def test_level_1_reaches_119_and_no_more() -> None:
    w = weight(8, 256)
    packed = quantize_weight(w, 128)
    assert torch.equal(packed.channel_scale, w.abs().amax(1) / 119)
    assert int(expand_int8(packed).abs().max()) <= 128


def test_weights_already_on_the_grid_come_back_exactly() -> None:
    q4 = torch.arange(128).remainder(16).repeat(4, 2)
    w = (q4 - 7) * 0.25
    packed = quantize_weight(w, -1)
    assert torch.equal(unpack_nibbles(packed.qweight, 4, 256).long(), q4)
    assert torch.equal(dequantize_weight(packed), w)


def test_a_single_outlier_leaves_other_groups_and_channels_alone() -> None:
    w = weight(4, 384)
    calm = dequantize_weight(quantize_weight(w, 128))
    w[2, 200] = 1e4
    packed = quantize_weight(w, 128)
    value = dequantize_weight(packed)
    assert torch.equal(value[[0, 1, 3]], calm[[0, 1, 3]])
    assert packed.group_word is not None
    scales = (packed.group_word & 255).t()[2]
    assert scales.tolist() == [1, 8, 1]
    assert float(value[2, 200]) == pytest.approx(1e4, rel=0.01)


# edge values and shapes


@both_formats
def test_zero_rows_and_groups_are_exactly_zero(group_size: Format) -> None:
    w = weight(6, 384)
    w[2] = 0
    w[4, 128:256] = 0
    value = dequantize_weight(quantize_weight(w, group_size))
    assert not value[2].any()
    if group_size == 128:
        assert not value[4, 128:256].any()
    assert not value.isnan().any()


@both_formats
@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, 128), (0, 5), (3, 0), (1, 1), (128, 128)])
def test_empty_and_tiny_shapes(group_size: Format, n: int, k: int) -> None:
    packed = quantize_weight(weight(n, k), group_size)
    assert packed.group_size == group_size
    assert packed.channel_scale.shape == (n,)
    assert expand_int8(packed).shape == (n, k)
    assert expand_int8(packed).dtype == torch.int8
    assert dequantize_weight(packed).dtype == torch.float32
    if packed.group_word is not None:
        assert packed.group_word.shape == (-(-k // 128), n)


@both_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes_equal_their_fp32_value(group_size: Format, dtype: torch.dtype) -> None:
    w = weight(40, 200).to(dtype)
    assert_same(quantize_weight(w, group_size), quantize_weight(w.float(), group_size))


@both_formats
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(group_size: Format, bad: float) -> None:
    w = weight(4, 128)
    w[1, 3] = bad
    with pytest.raises(Unsupported, match="NaN or infinite"):
        quantize_weight(w, group_size)


def test_an_unknown_group_size_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size 64"):
        quantize_weight(weight(2, 128), 64)


@both_formats
@pytest.mark.parametrize("amax", [2.0**-149, 150 * 2.0**-149, 1e-41, 1e-38])
def test_subnormal_channels_quantize_without_error(group_size: Format, amax: float) -> None:
    w = weight(3, 128).clamp(-1, 1) * amax
    w[:, 0] = amax
    value = dequantize_weight(quantize_weight(w, group_size))
    assert bool((value.abs() <= 1.5 * amax).all())


@both_formats
def test_neither_gradient_nor_memory_of_the_source_is_kept(group_size: Format) -> None:
    w = weight(4, 128).requires_grad_()
    packed = quantize_weight(w, group_size)
    before = dequantize_weight(packed)
    with torch.no_grad():
        w.zero_()
    assert not any(tensor.requires_grad for tensor in packed.tensors().values())
    assert torch.equal(dequantize_weight(packed), before)


# padding along K


@pytest.mark.parametrize("k", [1, 100, 129, 255])
def test_grouped_padding_contributes_zero_whatever_x_holds(k: int) -> None:
    packed = quantize_weight(weight(5, k) + 1, 128)
    padded = dataclasses.replace(packed, in_features=-(-k // 128) * 128)
    w8 = expand_int8(padded).int()
    assert not w8[:, k:].any()
    garbage = torch.full((padded.in_features,), 127, dtype=torch.int32)
    assert torch.equal((w8 * garbage).sum(1), (w8[:, :k] * 127).sum(1))


@pytest.mark.parametrize("k", [1, 100, 129, 255])
def test_per_channel_padding_is_code_zero(k: int) -> None:
    # that format multiplies codes and takes zero * token_sum off afterwards: only code 0 is inert
    packed = quantize_weight(weight(5, k) + 1, -1)
    full = unpack_nibbles(packed.qweight, 5, -(-k // 128) * 128)
    assert not full[:, k:].any()


# the two ways to expand


@given(n=st.integers(1, 130), k=st.integers(1, 300), seed=st.integers(0, 2**16))
@SETTINGS
def test_expand_is_the_documented_formula(n: int, k: int, seed: int) -> None:
    w = weight(n, k, seed)
    grouped, channel = quantize_weight(w, 128), quantize_weight(w, -1)
    assert grouped.group_word is not None
    assert channel.channel_zero is not None
    word = grouped.group_word.t().repeat_interleave(128, 1)[:, :k]
    scale, zero_scaled = word & 255, 128 - (word >> 8)
    q4 = unpack_nibbles(grouped.qweight, n, k).int()
    assert torch.equal(expand_int8(grouped).int(), q4 * scale - zero_scaled)
    q4 = unpack_nibbles(channel.qweight, n, k).int()
    assert torch.equal(expand_int8(channel).int(), q4 - channel.channel_zero[:, None])
    assert expand_int8(grouped).is_contiguous()
    assert expand_int8(channel).is_contiguous()


# rows and concat_rows


@given(
    n=st.integers(1, 300),
    k=st.integers(1, 200),
    group_size=st.sampled_from(FORMATS),
    data=st.data(),
)
@SETTINGS
def test_rows_equal_quantizing_the_slice(
    n: int, k: int, group_size: Format, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    w = weight(n, k)
    assert_same(
        rows(quantize_weight(w, group_size), start, stop),
        quantize_weight(w[start:stop], group_size),
    )


@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    k=st.integers(1, 200),
    group_size=st.sampled_from(FORMATS),
)
@SETTINGS
def test_concat_rows_equals_quantizing_the_stack(
    sizes: list[int], k: int, group_size: Format
) -> None:
    parts = [weight(n, k, seed) for seed, n in enumerate(sizes)]
    packed = [quantize_weight(w, group_size) for w in parts]
    assert_same(concat_rows(packed), quantize_weight(torch.cat(parts), group_size))


@both_formats
def test_concat_rows_undoes_rows(group_size: Format) -> None:
    packed = quantize_weight(weight(300, 200), group_size)
    parts = [rows(packed, 0, 77), rows(packed, 77, 205), rows(packed, 205, 300)]
    assert_same(concat_rows(parts), packed)


@both_formats
def test_rows_own_their_memory(group_size: Format) -> None:
    # a slice that kept the whole tensor alive would hide 16 bits' worth of savings
    part = rows(quantize_weight(weight(256, 128), group_size), 128, 256)
    for name, tensor in part.tensors().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_concat_rows_refuses_parts_that_disagree() -> None:
    w = weight(128, 128)
    with pytest.raises(ValueError, match="format"):
        concat_rows([quantize_weight(w, 128), quantize_weight(w, -1)])
    with pytest.raises(ValueError, match="in_features"):
        # 100 and 128 pad to the same tiles, so only the sizes tell them apart
        concat_rows([quantize_weight(w, 128), quantize_weight(w[:, :100], 128)])


@both_formats
def test_tensors_names_the_format(group_size: Format) -> None:
    names = set(quantize_weight(weight(2, 3), group_size).tensors())
    extra = "group_word" if group_size == 128 else "channel_zero"
    assert names == {"qweight", "channel_scale", extra}


@pytest.mark.parametrize("group_size", [128, -1])
def test_quantizing_in_chunks_changes_nothing(
    group_size: Literal[128, -1], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(3))
    whole = quantize_weight(weight, group_size)
    monkeypatch.setattr("qoqc.quant.weight.CHUNK", 200 * 128)
    for name, tensor in quantize_weight(weight, group_size).tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
