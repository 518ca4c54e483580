"""The kernel of the column loop against its definition."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from qoqc.calibrate.columns import Columns, choose_one_by_one
from qoqc.calibrate.gptq import factorize
from qoqc.calibrate.ranges import plain_grid
from qoqc.codegen.kernels.columns import COLUMNS, ROWS, launch_columns


def problem(n: int, k: int, group_size: Literal[128, -1]) -> tuple[torch.Tensor, ...]:
    """A weight [N, K], the scale, zero [G, N] and channel_scale of its grid, its Hessian."""
    generator = torch.Generator().manual_seed(n * 1009 + k)
    weight = torch.randn(n, k, generator=generator)
    weight[n // 2] = 0  # a channel with channel_scale 0
    x = torch.randn(2 * k, k, generator=generator)
    return weight, x.t() @ x / len(x)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize("n", [1, ROWS + 3])
@pytest.mark.parametrize("columns", [COLUMNS, 37])
def test_the_kernel_gives_the_codes_of_the_definition(
    n: int, columns: int, descends: bool, group_size: Literal[128, -1], device: torch.device
) -> None:
    """The block's columns are of two groups, as in an order by activation."""
    weight, hessian = problem(n, 2 * columns, group_size)
    grid = plain_grid(weight, group_size)
    order = torch.randperm(2 * columns, generator=torch.Generator().manual_seed(5))[:columns]
    if descends:
        matrix = hessian[order][:, order].contiguous()
        base = grid.values(grid.nearest(weight)).t()[order].contiguous()
        x = (hessian @ (weight.t() - grid.values(grid.nearest(weight)).t()))[order].contiguous()
    else:
        matrix = factorize(hessian, 0.01, False, "w").root[:columns, :columns].contiguous()
        base, x = None, weight.t()[order].contiguous()
    expected = choose_one_by_one(x, matrix, order.tolist(), grid, base)
    scale = torch.ones_like(grid.zero) if grid.scale is None else grid.scale
    group = order // 128 if grid.scale is not None else order * 0
    found = launch_columns(
        x.to(device),
        None if base is None else base.to(device),
        matrix.to(device),
        group=group.int().to(device),
        channel_scale=grid.channel_scale.to(device),
        scale=scale.t().contiguous().to(device),
        zero=grid.zero.t().contiguous().to(device),
    )
    codes, values, errors = (tensor.cpu() for tensor in found)
    # sums in another order: a value between two codes may fall to the other side, and then on
    assert (codes == expected.codes).float().mean() > 0.99
    same = (codes == expected.codes).all(0)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(values[:, same], expected.values[:, same], rtol=1e-6, atol=0)
    scale_of = float(expected.errors.abs().max())
    torch.testing.assert_close(
        errors[:, same], expected.errors[:, same], rtol=1e-3, atol=1e-4 * scale_of
    )


def test_the_definition_leaves_its_input_alone() -> None:
    weight, hessian = problem(4, 32, -1)
    grid, x = plain_grid(weight, -1), weight.t().contiguous()
    kept = x.clone()
    Columns(grid).choose(x, factorize(hessian, 0.01, False, "w").root, torch.arange(32))
    assert torch.equal(x, kept)


def test_a_block_that_is_too_wide_is_refused() -> None:
    x = torch.zeros(COLUMNS + 1, 4)
    with pytest.raises(ValueError, match="129 columns"):
        launch_columns(
            x, None, torch.eye(COLUMNS + 1), group=torch.zeros(COLUMNS + 1, dtype=torch.int32),
            channel_scale=torch.ones(4), scale=torch.ones(1, 4), zero=torch.ones(1, 4),
        )  # fmt: skip
