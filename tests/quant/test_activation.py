"""Per-token int8 activations: exact rounding, zero, bad and tiny tokens, shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqc.quant.activation import TINY_TOKEN, quantize_act

SETTINGS = settings(deadline=None, max_examples=30)
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(m: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    xq, scale, total = quantize_act(torch.ones(2, 3, 5, dtype=dtype))
    assert (xq.shape, xq.dtype) == ((2, 3, 5), torch.int8)
    assert (scale.shape, scale.dtype) == ((2, 3), torch.float32)
    assert (total.shape, total.dtype) == ((2, 3), torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_absmax_over_127(dtype: torch.dtype) -> None:
    x = tokens(16, 300).to(dtype)
    assert torch.equal(quantize_act(x)[1], x.float().abs().amax(-1) / 127.0)


@given(m=st.integers(1, 20), k=st.integers(1, 200), exponent=st.integers(-60, 60))
@SETTINGS
def test_error_is_half_a_step_and_the_largest_reaches_127(m: int, k: int, exponent: int) -> None:
    x = tokens(m, k) * 2.0**exponent
    xq, scale, _ = quantize_act(x)
    assert xq.abs().amax(-1).tolist() == [127] * m
    error = (xq.double() * scale[:, None] - x.double()).abs()
    assert bool((error <= scale[:, None].double() * (0.5 + 127 * 2.0**-22)).all())


def test_integers_up_to_127_are_kept() -> None:
    x = torch.arange(-127.0, 128)
    xq, scale, total = quantize_act(x)
    assert torch.equal(xq.float(), x)
    assert float(scale) == 1.0
    assert int(total) == 0


def test_halves_round_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 100.5])
    assert quantize_act(x)[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 100]


def test_the_sign_is_symmetric() -> None:
    x = tokens(8, 100)
    assert torch.equal(quantize_act(-x)[0], -quantize_act(x)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_token_gives_zeros(dtype: torch.dtype) -> None:
    x = tokens(3, 64).to(dtype)
    x[1] = 0
    xq, scale, total = quantize_act(x)
    assert not xq[1].any()
    assert (float(scale[1]), int(total[1])) == (0.0, 0)
    assert bool((scale[[0, 2]] > 0).all())


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_gives_a_nan_scale_and_zeros(
    bad: float, dtype: torch.dtype
) -> None:
    x = tokens(3, 64).to(dtype)
    clean = quantize_act(x)
    x[1, 7] = bad
    xq, scale, total = quantize_act(x)
    assert scale.isnan().tolist() == [False, True, False]
    assert not xq[1].any()
    assert int(total[1]) == 0
    for got, want in zip((xq, scale, total), clean, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize(
    ("absmax", "live"),
    [(TINY_TOKEN, True), (TINY_TOKEN / 2, False), (2.0**-149, False), (2.0**-99, True)],
)
def test_tiny_tokens_become_zero_below_the_limit(absmax: float, live: bool) -> None:
    xq, scale, _ = quantize_act(torch.tensor([absmax, -absmax / 2]))
    assert xq.tolist() == ([127, -64] if live else [0, 0])
    assert (float(scale) > 0) is live


def test_the_largest_float_stays_finite() -> None:
    top = torch.finfo(torch.float32).max
    xq, scale, _ = quantize_act(torch.tensor([top, -top, top / 127]))
    assert xq.tolist() == [127, -127, 1]
    assert bool(scale.isfinite())


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 3), (0,), (5,)])
def test_empty_and_flat_inputs(shape: tuple[int, ...]) -> None:
    xq, scale, total = quantize_act(torch.ones(shape))
    assert xq.shape == shape
    assert scale.shape == total.shape == shape[:-1]
    if shape[-1] == 0:
        assert not scale.any()
        assert not total.any()


def test_a_non_contiguous_input_gives_the_same_contiguous_result() -> None:
    x = tokens(40, 24)
    for view in (x.t(), x[::3], x[:, 1::2], x.expand(2, 40, 24)):
        got, want = quantize_act(view), quantize_act(view.clone())
        for a, b in zip(got, want, strict=True):
            assert a.is_contiguous()
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_input_is_not_changed(dtype: torch.dtype) -> None:
    x = tokens(3, 64).to(dtype)
    before = x.clone()
    quantize_act(x)
    assert torch.equal(x, before)


def test_the_sum_is_of_the_integers() -> None:
    x = tokens(10, 5000).abs()
    xq, _, total = quantize_act(x)
    assert torch.equal(total.long(), xq.long().sum(-1))
    assert int(total.max()) > 2**15  # beyond int8 and int16: the sum is really taken in int32


def test_tokens_are_independent() -> None:
    x = tokens(6, 128)
    together = quantize_act(x)
    for i in range(6):
        for whole, alone in zip(together, quantize_act(x[i]), strict=True):
            assert torch.equal(whole[i], alone)
