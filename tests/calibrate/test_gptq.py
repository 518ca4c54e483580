"""GPTQ against its textbook form, and the factorization under bad Hessians."""

from __future__ import annotations

import pytest
import torch

from qoqc.calibrate import gptq as gptq_file
from qoqc.calibrate.gptq import ATTEMPTS, factorize, gptq
from qoqc.calibrate.grid import Grid
from qoqc.calibrate.ranges import plain_grid
from qoqc.errors import Unsupported

FORMATS = (128, -1)
both_formats = pytest.mark.parametrize("group_size", FORMATS)


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def hessian(k: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 99)
    mix = torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(tokens, k, generator=generator) @ mix
    x = x * torch.logspace(-1, 1, k)[torch.randperm(k, generator=generator)]
    found: torch.Tensor = x.t() @ x / tokens
    return found


def textbook(
    w: torch.Tensor, grid: Grid, h: torch.Tensor, order: list[int], damping: float
) -> torch.Tensor:
    """GPTQ with the inverse of what is left computed anew for every column, in fp64."""
    rest = w.double().clone()
    damped = h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h)).double()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for place, k in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(damped[left][:, left])
        column = grid.column(k)
        code = column.codes(rest[:, k])
        codes[:, k] = code.to(torch.uint8)
        error = (rest[:, k] - column.values(code)) / inverse[0, 0]
        rest[:, left] -= error[:, None] * inverse[0]
    return codes


@both_formats
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("n", "k"), [(5, 1), (12, 40), (7, 150)])
def test_it_is_the_textbook_algorithm(group_size: int, act_order: bool, n: int, k: int) -> None:
    w, h = weight(n, k), hessian(k, 3 * k)
    grid = plain_grid(w, group_size)
    factor = factorize(h, 0.01, act_order, "a")
    order = factor.order.tolist()
    assert order == (sorted(range(k), key=lambda i: -float(h[i, i])) if act_order else [*range(k)])
    found = gptq(w, grid, factor)
    assert found.shape == (n, k)
    # one code may differ where fp32 and fp64 fall on two sides of a tie, and change what follows
    agree = (found == textbook(w, grid, h, order, 0.01)).all(1)
    assert int(agree.sum()) >= n - 1


def test_blocks_only_change_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = weight(20, 200), hessian(200, 600)
    grid, factor = plain_grid(w, 128), factorize(h, 0.01, True, "a")
    whole = gptq(w, grid, factor)
    monkeypatch.setattr(gptq_file, "BLOCK", 7)
    agree = (gptq(w, grid, factor) == whole).all(1)
    assert int(agree.sum()) >= 19


@both_formats
def test_without_correlation_it_rounds_to_nearest(group_size: int) -> None:
    w = weight(9, 140)
    grid = plain_grid(w, group_size)
    factor = factorize(torch.diag(torch.linspace(1, 5, 140)), 0.01, True, "a")
    assert torch.equal(gptq(w, grid, factor), grid.nearest(w))


def test_the_source_is_left_alone_and_rows_do_not_interact() -> None:
    w, h = weight(30, 100), hessian(100, 300)
    before = w.clone()
    grid, factor = plain_grid(w, 128), factorize(h, 0.01, True, "a")
    whole = gptq(w, grid, factor)
    assert torch.equal(w, before)
    assert torch.equal(whole, gptq(w, grid, factor)), "deterministic"
    some = gptq(w[:10], plain_grid(w[:10], 128), factor)
    assert int((some == whole[:10]).all(1).sum()) >= 9  # near ties, as above


def test_the_root_is_that_of_the_inverse() -> None:
    h = hessian(60, 200)
    factor = factorize(h, 0.05, True, "a")
    root = factor.root.double()
    assert torch.equal(root, root.triu())
    damped = h.double() + 0.05 * h.double().diagonal().mean() * torch.eye(60)
    damped = damped[factor.order][:, factor.order]
    product = root.t() @ root @ damped
    torch.testing.assert_close(product, torch.eye(60).double(), rtol=0, atol=1e-3)  # root is fp32


def test_dead_channels_take_no_part_and_round_to_nearest() -> None:
    w, h = weight(8, 50), hessian(50, 150)
    h[7] = 0
    h[:, 7] = 0
    grid = plain_grid(w, 128)
    factor = factorize(h, 0.01, True, "a")
    assert factor.attempts == 1
    assert factor.order.tolist()[-1] == 7
    assert torch.equal(gptq(w, grid, factor)[:, 7], grid.nearest(w)[:, 7])


def test_a_layer_that_saw_only_zeros_rounds_to_nearest() -> None:
    w = weight(4, 30)
    grid = plain_grid(w, -1)
    factor = factorize(torch.zeros(30, 30), 0.01, True, "a")
    assert torch.equal(gptq(w, grid, factor), grid.nearest(w))


def test_few_tokens_need_no_more_than_the_damping() -> None:
    factor = factorize(hessian(200, 3), 0.01, True, "a")
    assert factor.attempts == 1
    assert bool(torch.isfinite(factor.root).all())


def test_damping_grows_until_the_factorization_succeeds() -> None:
    # eigenvalues 1 +- 1.35: positive definite from a damping of 0.35 of the mean diagonal on
    h = torch.tensor([[1.0, 1.35], [1.35, 1.0]])
    factor = factorize(h, 0.1, False, "a")
    assert factor.attempts == 4
    assert factor.damping == pytest.approx(0.4)


def test_a_hopeless_hessian_is_refused_by_name() -> None:
    h = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    with pytest.raises(Unsupported, match=rf"o_proj: .*{ATTEMPTS * 0.01:g} of its mean diagonal"):
        factorize(h, 0.01, True, "o_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    h = hessian(10, 30)
    h[3, 4] = bad
    with pytest.raises(Unsupported, match="o_proj: the calibration Hessian holds NaN"):
        factorize(h, 0.01, True, "o_proj")
