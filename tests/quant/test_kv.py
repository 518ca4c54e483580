"""The KV grid, its words and the byte layouts of K and V."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqc.quant.kv import (
    FP16_MAX,
    dequantize_kv,
    empty_pages,
    fake_quantize_kv,
    kv_grid,
    make_words,
    pack_k,
    split_words,
    unpack_k,
    unpack_v,
)

SETTINGS = settings(deadline=None, max_examples=40)
NAN, INF = float("nan"), float("inf")
BITS = [4, 8]
both_bits = pytest.mark.parametrize("bits", BITS)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_and_bound(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """|x - round trip| and half a step plus what rounding low and scale to fp16 can add."""
    codes, scale, low = kv_grid(x, bits)
    top, step = 2**bits - 1, scale.double()[..., None]
    half_ulp = 2.0**-11  # relative, of an fp16 number; 2**-25 absolute where it is subnormal
    low_rounding = low.double()[..., None].abs() * half_ulp + 2.0**-25
    scale_rounding = top * (step * half_ulp + 2.0**-25)
    bound = step / 2 + low_rounding + scale_rounding
    error = (dequantize_kv(codes, scale, low).double() - x.double()).abs()
    return error, bound * (1 + 1e-5)


@given(
    magnitude=st.sampled_from([1e-7, 1e-4, 1e-2, 1.0, 30.0, 1e4]),
    shift=st.sampled_from([0.0, -1.0, 1.0, 40.0]),
    dim=st.sampled_from([2, 64, 128]),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**16),
)
@SETTINGS
def test_error_is_half_a_step_and_fp16_rounding(
    magnitude: float, shift: float, dim: int, bits: int, seed: int
) -> None:
    x = (vectors(5, dim, seed=seed).clamp(-4, 4) + shift) * magnitude
    error, bound = error_and_bound(x.clamp(-FP16_MAX, FP16_MAX), bits)
    assert bool((error <= bound).all())


@both_bits
def test_codes_span_the_grid(bits: int) -> None:
    codes, scale, low = kv_grid(vectors(7, 3, 128), bits)
    assert (codes.dtype, scale.dtype, low.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert codes.shape == (7, 3, 128)
    assert scale.shape == low.shape == (7, 3)
    assert bool((codes.amin(-1) == 0).all())
    assert bool((codes.amax(-1) == 2**bits - 1).all())


@both_bits
def test_a_grid_the_format_can_hold_is_kept_exactly(bits: int) -> None:
    top = 2**bits - 1
    x = torch.arange(top + 1) * 0.125 - 3.0
    codes, scale, low = kv_grid(x, bits)
    assert codes.tolist() == list(range(top + 1))
    assert (float(scale), float(low)) == (0.125, -3.0)
    assert torch.equal(dequantize_kv(codes, scale, low), x)


@both_bits
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.14159, 1e-7, 600.3, -65504.0])
def test_a_constant_vector_is_exact_to_fp16(bits: int, value: float) -> None:
    x = torch.full((2, 64), value)
    codes, scale, low = kv_grid(x, bits)
    assert bool((scale >= 0).all())
    want = x.half().float()
    # a scale of fp16's smallest step may remain where rounding low left a remainder
    assert bool(((dequantize_kv(codes, scale, low) - x).abs() <= (want - x).abs()).all())


@both_bits
def test_values_of_1e4(bits: int) -> None:
    x = vectors(4, 128).sign() * 1e4
    error, bound = error_and_bound(x, bits)
    assert bool((error <= bound).all())
    assert float(error.max()) <= 10  # the step is 1333 at 4 bits, yet both ends are grid points


@both_bits
def test_a_large_bias_costs_no_more_than_its_fp16_step(bits: int) -> None:
    x = 600 + 5 * (2 * torch.rand(16, 128, generator=torch.Generator().manual_seed(0)) - 1)
    error, bound = error_and_bound(x, bits)
    assert bool((error <= bound).all())
    fp16_step = 0.5  # between 512 and 1024
    assert float(error.max()) <= 10 / (2**bits - 1) / 2 * 1.07 + fp16_step / 2


@both_bits
@pytest.mark.parametrize("high", [65519.0, 1e6, 3e38, INF])
def test_values_beyond_fp16_saturate(bits: int, high: float) -> None:
    value = dequantize_kv(*kv_grid(torch.tensor([0.0, high]), bits))
    assert value[0] == 0
    assert float(value[1]) == pytest.approx(FP16_MAX, rel=2.0**-10)
    value = dequantize_kv(*kv_grid(torch.tensor([-high, 0.0]), bits))
    assert float(value[0]) == -FP16_MAX
    assert dequantize_kv(*kv_grid(torch.full((4,), high), bits)).tolist() == [FP16_MAX] * 4


@both_bits
@pytest.mark.parametrize("others", [[0.0, 1.0], [INF, 1.0], [-INF, INF]])
def test_nan_never_reads_as_a_number(bits: int, others: list[float]) -> None:
    x = torch.tensor([[NAN, *others], [1.0, 2.0, 3.0]])
    codes, scale, low = kv_grid(x, bits)
    value = dequantize_kv(codes, scale, low)
    assert bool(value[0].isnan().all())
    assert not value[1].isnan().any()
    assert codes[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@both_bits
def test_fake_quantize_is_the_round_trip_in_the_input_dtype(bits: int, dtype: torch.dtype) -> None:
    x = vectors(2, 3, 64).to(dtype)
    got = fake_quantize_kv(x.transpose(0, 1), bits)
    assert got.dtype == dtype
    assert got.is_contiguous()
    want = dequantize_kv(*kv_grid(x, bits)).to(dtype)
    assert torch.equal(got, want.transpose(0, 1))


@both_bits
def test_empty_inputs(bits: int) -> None:
    for shape in ((0, 64), (2, 0, 3, 8)):
        codes, scale, low = kv_grid(torch.ones(shape), bits)
        assert codes.shape == shape
        assert scale.shape == low.shape == shape[:-1]
        assert make_words(scale, low).shape == shape[:-1]


# words


def test_words_hold_every_pair_of_fp16_patterns() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    for low in (every.flip(0), every.roll(12345)):
        scale_back, low_back = split_words(make_words(every, low))
        assert torch.equal(scale_back.view(torch.int16), every.view(torch.int16))
        assert torch.equal(low_back.contiguous().view(torch.int16), low.view(torch.int16))


@pytest.mark.parametrize(
    ("scale", "low", "word"),
    [
        (1.0, 0.0, 0x00003C00),
        (1.0, -8.0, 0xC8003C00),
        (2.0**-24, -(2.0**-24), 0x80010001),
        (0.0, 65504.0, 0x7BFF0000),
        (-1.0, -1.0, 0xBC00BC00),
    ],
)
def test_word_bits(scale: float, low: float, word: int) -> None:
    got = make_words(torch.tensor([scale]).half(), torch.tensor([low]).half())
    assert got.dtype == torch.int32
    assert int(got) & 0xFFFFFFFF == word


def test_words_of_strided_views() -> None:
    words = make_words(vectors(3, 2, 64).half(), vectors(3, 2, 64, seed=1).half())
    assert torch.equal(make_words(*split_words(words.transpose(0, 1))), words.transpose(0, 1))


# layouts


@both_bits
@given(dim=st.integers(1, 70), seed=st.integers(0, 2**16))
@SETTINGS
def test_unpack_k_inverts_pack_k(bits: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 2 * dim), dtype=torch.uint8, generator=generator)
    stored = pack_k(codes, bits)
    assert stored.shape == (3, 2 * dim * bits // 8)
    assert torch.equal(unpack_k(stored, bits), codes)


def test_k_bytes_hold_the_rotate_pair() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=torch.uint8)
    assert pack_k(codes, 4).tolist() == [[0x41, 0x52, 0x63]]
    assert pack_k(codes, 8).tolist() == [[1, 2, 3, 4, 5, 6]]


def test_v_bytes_hold_tokens_32_apart() -> None:
    stored = torch.zeros(2, 32, dtype=torch.uint8)  # [D, 32]
    stored[1, 5] = 0xB3
    codes = unpack_v(stored, 4)  # [64, D]
    assert codes.shape == (64, 2)
    assert int(codes[5, 1]) == 3
    assert int(codes[37, 1]) == 0xB
    assert int(codes.sum()) == 3 + 0xB
    eight = torch.arange(128, dtype=torch.uint8).view(2, 64)
    assert torch.equal(unpack_v(eight, 8), eight.t())


@both_bits
def test_empty_pages_have_the_documented_shapes(bits: int) -> None:
    k_pages, v_pages, words = empty_pages(3, 2, 64, 96, bits, "cpu")
    assert k_pages.shape == (3, 2, 64, 64 * bits // 8)
    assert v_pages.shape == (3, 2, 96, 64 * bits // 8)
    assert words.shape == (3, 2, 2, 64)
    assert (k_pages.dtype, v_pages.dtype, words.dtype) == (torch.uint8, torch.uint8, torch.int32)
    assert not any(bool(x.any()) for x in (k_pages, v_pages, words))
