"""Clip search: never worse than full ranges, always within the exactness conditions."""

from __future__ import annotations

import pytest
import torch

from qoqc.calibrate import ranges
from qoqc.calibrate.clip import level2_candidates, search_grouped, search_per_channel
from qoqc.calibrate.grid import Grid
from qoqc.calibrate.ranges import groups_of, plain_grid

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
FORMATS = (128, -1)
both_formats = pytest.mark.parametrize("group_size", FORMATS)


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Mostly small, with one entry in a hundred three times the rest: worth clipping."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    return w * (1 + 2 * (torch.rand(n, k, generator=generator) > 0.99))


def hessian(k: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(3 * k, k, generator=torch.Generator().manual_seed(seed + 99))
    x = x * torch.linspace(0.1, 3, k) + 0.3
    return x.t() @ x / len(x)


def search(w: torch.Tensor, h: torch.Tensor, group_size: int) -> Grid:
    find = search_grouped if group_size == 128 else search_per_channel
    return find(w, h, RATIOS)


def row_errors(w: torch.Tensor, h: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[N], the objective of each format: within groups, or over the whole channel."""
    delta = (grid.values(grid.nearest(w)) - w).double()
    if grid.scale is None:
        return ((delta @ h.double()) * delta).sum(1)
    total = torch.zeros(len(w), dtype=torch.float64)
    for start in range(0, w.shape[1], 128):
        part = delta[:, start : start + 128]
        block = h[start : start + 128, start : start + 128].double()
        total += ((part @ block) * part).sum(1)
    return total


def test_every_level_2_candidate_of_every_range_is_exact() -> None:
    low, high = torch.cartesian_prod(torch.arange(-119.0, 120), torch.arange(-119.0, 120)).T
    low, high = low[low <= high], high[low <= high]
    count = 0
    for scale, zero in level2_candidates(low, high):
        count += 1
        assert bool((zero * scale <= 128).all())
        assert bool(((15 - zero) * scale <= 127).all())
        assert bool(((scale >= 1) & (scale <= 16)).all())
        assert bool(((zero >= 0) & (zero <= 15)).all())
        assert torch.equal(scale, scale.round())
        assert torch.equal(zero, zero.round())
    assert count > 10


@both_formats
@pytest.mark.parametrize(("n", "k"), [(1, 1), (20, 100), (130, 256), (40, 300)])
def test_no_channel_is_worse_than_with_full_ranges(group_size: int, n: int, k: int) -> None:
    w, h = weight(n, k), hessian(k)
    found = row_errors(w, h, search(w, h, group_size))
    plain = row_errors(w, h, plain_grid(w, group_size))
    # the search compares fp32 sums
    assert bool((found <= plain * (1 + 1e-4)).all())
    if k >= 100:
        assert float(found.sum()) < 0.95 * float(plain.sum())


@both_formats
def test_the_search_weighs_errors_by_the_inputs(group_size: int) -> None:
    # one outlier weight on a channel that hardly ever fires: it is clipped, else it is kept
    w = weight(1, 128).clamp(-1, 1)
    w[0, 5] = 8.0
    quiet, loud = torch.eye(128), torch.eye(128)
    quiet[5, 5], loud[5, 5] = 1e-4, 100.0
    kept = search(w, loud, group_size)
    clipped = search(w, quiet, group_size)
    assert float(kept.values(kept.nearest(w))[0, 5]) > 7.5
    assert float(clipped.values(clipped.nearest(w))[0, 5]) < 7.0


@both_formats
def test_the_result_does_not_depend_on_the_rows_searched_together(
    group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, h = weight(300, 200), hessian(200)
    whole = search(w, h, group_size)
    monkeypatch.setattr(ranges, "ROWS", 200 * 128)
    pieces = search(w, h, group_size)
    # a GEMM of another height may sum in another order, which decides near ties
    error, other = row_errors(w, h, whole).sum(), row_errors(w, h, pieces).sum()
    torch.testing.assert_close(error, other, rtol=1e-4, atol=0)


def test_zero_channels_and_groups_get_a_grid() -> None:
    w, h = weight(4, 256), hessian(256)
    w[1] = 0
    w[2, :128] = 0
    for group_size in FORMATS:
        grid = search(w, h, group_size)
        values = grid.values(grid.nearest(w))
        assert not values[1].any()
        assert bool(torch.isfinite(values).all())
        if group_size == 128:
            assert not groups_of(values)[2, 0].any()
