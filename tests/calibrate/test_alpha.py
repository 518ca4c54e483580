"""The strength search within its budget, and smoothing scales with shared and dead channels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqc.calibrate.alpha import search_strength, smoothing_scale
from qoqc.errors import OptionError, Unsupported

SETTINGS = settings(deadline=None, max_examples=30)


def bowl(alpha: float, beta: float) -> Callable[[float, float], float]:
    return lambda a, b: 1 + (a - alpha) ** 2 + (b - beta) ** 2


# the search


def test_the_whole_grid_is_the_papers() -> None:
    found = search_strength(lambda a, b: 1.0, "a", max_trials=1000, first_step=1)
    pairs = {(trial.alpha, trial.beta) for trial in found.trials}
    expected = {(0.0, 0.0)}
    expected |= {(i / 20, 0.0) for i in range(21)} | {(i / 20, (20 - i) / 20) for i in range(21)}
    assert pairs == expected
    assert len(found.trials) == len(expected) == 41
    assert (found.best.alpha, found.best.beta) == (0, 0), "of equal ones the first"


@given(place=st.integers(1, 20), paired=st.booleans())
@SETTINGS
def test_coarse_to_fine_finds_the_best_of_the_grid(place: int, paired: bool) -> None:
    alpha, beta = place / 20, (20 - place) / 20 if paired else 0.0
    found = search_strength(bowl(alpha, beta), "a", max_trials=20)
    assert found.best.alpha == alpha
    assert found.best.beta == beta
    assert found.best.error == 1.0
    assert len(found.trials) <= 19


@pytest.mark.parametrize("max_trials", [1, 2, 5, 16])
def test_the_budget_is_kept_and_the_first_trial_is_no_smoothing(max_trials: int) -> None:
    calls: list[tuple[float, float]] = []

    def error(alpha: float, beta: float) -> float:
        calls.append((alpha, beta))
        return bowl(0.35, 0.65)(alpha, beta)

    found = search_strength(error, "a", max_trials=max_trials)
    assert len(calls) == len(set(calls)) == len(found.trials) <= max_trials
    assert calls[0] == (0.0, 0.0)
    assert calls == [(trial.alpha, trial.beta) for trial in found.trials]
    assert found.best.error == min(trial.error for trial in found.trials)


def test_without_beta_only_the_activations_count() -> None:
    found = search_strength(bowl(0.65, 0), "a", with_beta=False)
    assert all(trial.beta == 0 for trial in found.trials)
    assert found.best.alpha == 0.65


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_error_that_is_no_number_never_wins(bad: float) -> None:
    found = search_strength(lambda a, b: bad if a > 0.4 else 2 - a, "a", with_beta=False)
    assert found.best.alpha == 0.4
    assert all(math.isinf(trial.error) for trial in found.trials if trial.alpha > 0.4)


def test_smoothing_that_does_not_help_is_left_out() -> None:
    found = search_strength(lambda a, b: 1 + a + b, "a")
    assert (found.best.alpha, found.best.beta) == (0, 0)


def test_a_layer_that_is_broken_without_smoothing_is_named() -> None:
    with pytest.raises(Unsupported, match=r"layers\.2\.o_proj: the output error"):
        search_strength(lambda a, b: math.nan, "layers.2.o_proj")


def test_the_line_for_the_report() -> None:
    line = str(search_strength(lambda a, b: 4 - a, "a", with_beta=False))
    assert line == "alpha 1, beta 0, 0.75 of the error without; 8 trials"


@pytest.mark.parametrize("options", [{"max_trials": 0}, {"first_step": 0}])
def test_bad_budgets(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="at least 1"):
        search_strength(bowl(0, 0), "a", **options)


# the scale


def absmax(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 9 + 0.5


@given(alpha=st.sampled_from([0.0, 0.3, 1.0]), beta=st.sampled_from([0.0, 0.7, 1.0]))
@SETTINGS
def test_it_is_the_papers_formula_up_to_one_factor(alpha: float, beta: float) -> None:
    x, w = absmax(24), absmax(24, 1)
    scale = smoothing_scale(x, w, alpha, beta, "a")
    ratio = scale.double() / (x.double() ** alpha / w.double() ** beta)
    torch.testing.assert_close(ratio, ratio[:1].expand(24), rtol=1e-6, atol=0)
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-5)
    assert scale.dtype == torch.float32


def test_no_strength_is_no_scale() -> None:
    assert torch.equal(smoothing_scale(absmax(8), None, 0, 0, "a"), torch.ones(8))


def test_full_strength_levels_the_activations() -> None:
    x = absmax(16)
    levelled = x / smoothing_scale(x, None, 1, 0, "a")
    torch.testing.assert_close(levelled, levelled[:1].expand(16))


def test_channels_rotated_together_share_the_scale_of_the_larger() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0, 1.0])
    half = torch.tensor([0, 1, 2, 0, 1, 2])  # rotate-half of 3 pairs
    even = torch.tensor([0, 0, 2, 2, 4, 4])  # neighbours, as GPT-J
    largest = torch.tensor([4.0, 8, 3, 4, 8, 3])
    plain = smoothing_scale(largest, None, 0.5, 0, "a")
    assert torch.equal(smoothing_scale(x, None, 0.5, 0, "a", half), plain)
    largest = torch.tensor([2.0, 2, 4, 4, 8, 8])
    plain = smoothing_scale(largest, None, 0.5, 0, "a")
    assert torch.equal(smoothing_scale(x, None, 0.5, 0, "a", even), plain)


def test_heads_by_channels_and_equality_to_the_last_bit() -> None:
    x = absmax(3 * 34).view(3, 34)
    partner = torch.cat((torch.arange(17, 34), torch.arange(17)))
    place = torch.minimum(torch.arange(34), partner)
    per_head = place + 100 * torch.arange(3)[:, None]
    scale = smoothing_scale(x, None, 0.35, 0, "a", per_head)
    assert scale.shape == (3, 34)
    assert torch.equal(scale, scale[:, partner])
    assert not torch.equal(scale[0], scale[1])
    common = smoothing_scale(x, None, 0.35, 0, "a", place.expand(3, 34))
    assert torch.equal(common, common[:1].expand(3, 34))


def test_sharing_covers_the_weights_too() -> None:
    w = torch.tensor([1.0, 5.0, 2.0, 3.0])
    shared = torch.tensor([7, 7, 9, 9])
    found = smoothing_scale(torch.ones(4), w, 0.5, 0.5, "a", shared)
    expected = smoothing_scale(torch.ones(4), torch.tensor([5.0, 5, 3, 3]), 0.5, 0.5, "a")
    assert torch.equal(found, expected)


def test_dead_channels_are_left_alone() -> None:
    x, w = absmax(6), absmax(6, 1)
    x[1], w[4] = 0, 0
    scale = smoothing_scale(x, w, 0.5, 0.5, "a")
    assert scale[1] == scale[4] == 1
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert torch.equal(smoothing_scale(x * 0, w, 0.5, 0.5, "a"), torch.ones(6))


@given(seed=st.integers(0, 2**16), spread=st.integers(0, 30))
@SETTINGS
def test_folding_is_exact_in_fp64_up_to_rounding(seed: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 8, generator=generator) * 2.0 ** torch.linspace(-spread, spread, 8)
    w = torch.randn(3, 8, generator=generator)
    scale = smoothing_scale(x.abs().amax(0), w.abs().amax(0), 0.5, 0.5, "a").double()
    y = (x.double() / scale) @ (w.double() * scale).t()
    exact = x.double() @ w.double().t()
    torch.testing.assert_close(y, exact, rtol=0, atol=1e-12 * float(exact.abs().max()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_statistics_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    broken = absmax(4)
    broken[2] = bad
    with pytest.raises(Unsupported, match="down_proj: the activations hold NaN or infinity"):
        smoothing_scale(broken, absmax(4), 0.3, 0.7, "down_proj")
    with pytest.raises(Unsupported, match="down_proj: the weights hold NaN or infinity"):
        smoothing_scale(absmax(4), broken, 0.3, 0.7, "down_proj")


def test_beta_needs_weights() -> None:
    with pytest.raises(ValueError, match="o_proj: beta=0.7"):
        smoothing_scale(absmax(4), None, 0.3, 0.7, "o_proj")
