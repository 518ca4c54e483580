"""The correction of weights for rounded inputs: least squares, drawn to the weight by damping."""

from __future__ import annotations

import torch

from qoqc.calibrate.layer_weights import corrected

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(6, 16, generator=GENERATOR)
EXACT = torch.randn(400, 16, generator=GENERATOR)
SEEN = EXACT * 1.2 + 0.3 * torch.randn(400, 16, generator=GENERATOR)


def moments(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return seen.t() @ seen / len(seen), EXACT.t() @ seen / len(seen)


def test_exact_inputs_change_nothing() -> None:
    assert torch.equal(corrected(WEIGHT, *moments(EXACT), 0.01), WEIGHT)


def test_it_is_the_least_squares_answer() -> None:
    expected = torch.linalg.lstsq(SEEN.double(), (EXACT @ WEIGHT.t()).double()).solution.t()
    found = corrected(WEIGHT, *moments(SEEN), 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_damping_draws_it_back() -> None:
    distance = [
        float((corrected(WEIGHT, *moments(SEEN), damping) - WEIGHT).norm())
        for damping in (0.0, 0.1, 1.0, 100.0)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 0.02 * distance[0]
