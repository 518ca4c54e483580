"""Input statistics: sums over batches, and inputs that are refused."""

from __future__ import annotations

import pytest
import torch

from qoqc.calibrate.hessian import Hessian
from qoqc.errors import Unsupported


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_batches_add_up_to_the_whole() -> None:
    x = inputs(40, 24)
    whole, parts = Hessian(24, "a"), Hessian(24, "b")
    whole.add(x)
    for part in (x[:7], x[7:8].view(1, 1, 24), x[8:].view(4, 8, 24), x[:0]):
        parts.add(part)
    assert parts.tokens == whole.tokens == 40
    exact = (x.double().t() @ x.double()) / 40
    for hessian in (whole, parts):
        torch.testing.assert_close(hessian.matrix().double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.equal(hessian.absmax, x.abs().amax(0))


def test_the_trace_form_is_the_mean_squared_output_error() -> None:
    x, delta = inputs(300, 16), inputs(5, 16, seed=1)
    hessian = Hessian(16, "a")
    hessian.add(x)
    traced = torch.trace(delta @ hessian.matrix() @ delta.t())
    torch.testing.assert_close(traced, (x @ delta.t()).square().sum(1).mean(), rtol=1e-5, atol=0)


def test_the_matrix_is_exactly_symmetric() -> None:
    hessian = Hessian(130, "a")
    hessian.add(inputs(77, 130))
    assert torch.equal(hessian.matrix(), hessian.matrix().t())


def test_lower_precision_inputs_are_summed_in_fp32() -> None:
    x = inputs(2000, 4).to(torch.bfloat16)
    hessian = Hessian(4, "a")
    hessian.add(x)
    exact = (x.double().t() @ x.double()) / 2000
    torch.testing.assert_close(hessian.matrix().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_inputs_that_are_not_finite_are_refused_and_leave_no_trace(bad: float) -> None:
    hessian = Hessian(8, "layers.3.mlp.down_proj")
    hessian.add(inputs(5, 8))
    before = hessian.matrix()
    x = inputs(5, 8, seed=1)
    x[2, 6] = bad
    with pytest.raises(Unsupported, match=r"layers\.3\.mlp\.down_proj: .*NaN or infinity"):
        hessian.add(x)
    assert torch.equal(hessian.matrix(), before)
    assert hessian.tokens == 5
    assert bool(torch.isfinite(hessian.absmax).all())


def test_squares_that_overflow_are_refused() -> None:
    hessian = Hessian(4, "up_proj")
    with pytest.raises(Unsupported, match="up_proj: the squares .* overflow"):
        hessian.add(torch.full((2, 4), 1e20))


def test_no_tokens_and_other_sizes_are_named() -> None:
    hessian = Hessian(4, "experts.7.up_proj")
    hessian.add(torch.empty(0, 4))
    with pytest.raises(Unsupported, match=r"experts\.7\.up_proj: no calibration token"):
        hessian.matrix()
    with pytest.raises(ValueError, match=r"experts\.7\.up_proj: inputs of 5 channels, expected 4"):
        hessian.add(torch.zeros(2, 5))
