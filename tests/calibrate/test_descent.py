"""Coordinate descent: every pass lowers the error, and at rest no single change would."""

from __future__ import annotations

import pytest
import torch

from qoqc.calibrate import descent
from qoqc.calibrate.descent import descend
from qoqc.calibrate.gptq import factorize, gptq
from qoqc.calibrate.grid import Grid
from qoqc.calibrate.ranges import plain_grid

both_formats = pytest.mark.parametrize("group_size", (128, -1))


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def hessian(k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 99)
    mix = torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(4 * k, k, generator=generator) @ mix * torch.linspace(0.3, 3, k)
    found: torch.Tensor = x.t() @ x / len(x)
    return found


def row_errors(w: torch.Tensor, codes: torch.Tensor, grid: Grid, h: torch.Tensor) -> torch.Tensor:
    delta = (grid.values(codes) - w).double()
    return ((delta @ h.double()) * delta).sum(1)


@both_formats
@pytest.mark.parametrize(("n", "k"), [(6, 1), (20, 90), (12, 200)])
def test_no_pass_raises_the_error_of_any_channel(group_size: int, n: int, k: int) -> None:
    w, h = weight(n, k), hessian(k)
    grid = plain_grid(w, group_size)
    start = gptq(w, grid, factorize(h, 0.01, True, "a"))
    errors = [row_errors(w, descend(w, start, grid, h, passes), grid, h) for passes in range(5)]
    for before, after in zip(errors, errors[1:], strict=False):
        # a step is taken by fp32 gradients
        assert bool((after <= before * (1 + 1e-5) + 1e-9).all())
    if k >= 90:
        assert float(errors[-1].sum()) < 0.98 * float(errors[0].sum())
    assert torch.equal(descend(w, start, grid, h, 0), start)


@both_formats
def test_at_rest_no_other_code_is_better(group_size: int) -> None:
    w, h = weight(5, 30), hessian(30)
    grid = plain_grid(w, group_size)
    rest = descend(w, grid.nearest(w), grid, h, 100)
    assert torch.equal(rest, descend(w, rest, grid, h, 1))
    least = row_errors(w, rest, grid, h)
    for k in range(30):
        for code in range(16):
            other = rest.clone()
            other[:, k] = code
            assert bool((row_errors(w, other, grid, h) >= least * (1 - 1e-5)).all())


def test_blocks_only_change_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = weight(20, 150), hessian(150)
    grid = plain_grid(w, 128)
    whole = descend(w, grid.nearest(w), grid, h, 2)
    monkeypatch.setattr(descent, "BLOCK", 11)
    # a code at a tie may fall to either side, and change what follows in its row
    assert int((descend(w, grid.nearest(w), grid, h, 2) == whole).all(1).sum()) >= 18


@both_formats
def test_without_correlation_nearest_is_at_rest(group_size: int) -> None:
    w = weight(7, 140)
    grid = plain_grid(w, group_size)
    nearest = grid.nearest(w)
    assert torch.equal(descend(w, nearest, grid, torch.eye(140), 3), nearest)


def test_a_hessian_without_weight_on_a_channel_changes_nothing() -> None:
    w = weight(4, 20)
    grid = plain_grid(w, -1)
    start = gptq(w, grid, factorize(torch.zeros(20, 20), 0.01, True, "a"))
    assert torch.equal(descend(w, start, grid, torch.zeros(20, 20), 3), start)
