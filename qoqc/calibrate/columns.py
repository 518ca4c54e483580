"""One block of columns: each takes its code, and its error is passed on to those behind it.

The inner loop of GPTQ and of its descent. In torch it is eleven small operations per column, and a
large model has millions of columns: on a GPU one kernel does a block (codegen/kernels/columns.py).
"""

from __future__ import annotations

import dataclasses

import torch

from qoqc.calibrate.grid import Grid
from qoqc.codegen.kernels.columns import launch_columns
from qoqc.ir.spec import GROUP


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Codes as fp32 whole numbers, the values they stand for, and the errors passed on: [B, N]."""

    codes: torch.Tensor
    values: torch.Tensor
    errors: torch.Tensor


class Columns:
    """The grid of a weight, laid out for its columns: rows of G groups, N channels side by side."""

    def __init__(self, grid: Grid) -> None:
        """Transpose `grid` once for all blocks."""
        self._grid = grid
        self._grouped = grid.scale is not None
        self._zero = grid.zero.t().contiguous()
        scale = torch.ones_like(grid.zero) if grid.scale is None else grid.scale
        self._scale = scale.t().contiguous()

    def choose(
        self,
        x: torch.Tensor,
        matrix: torch.Tensor,
        order: torch.Tensor,
        base: torch.Tensor | None = None,
    ) -> Chosen:
        """Codes for the columns `order` int64 [B] of `x` fp32 [B, N], which is left as it is.

        matrix  fp32 [B, B]: x[j] loses matrix[i, j] times the error of i < j
        base    None (GPTQ): column i wants to be x[i], and its error is (x[i] - value) over
                matrix[i, i]; else (descent) it wants to be base[i] + x[i] / matrix[i, i], and its
                error is value - base[i]
        """
        if x.is_cuda:
            group = torch.div(order, GROUP, rounding_mode="floor") if self._grouped else order * 0
            found = launch_columns(
                x.contiguous(),
                base,
                matrix.contiguous(),  # what CUDA solves for comes column by column
                group=group.int(),
                channel_scale=self._grid.channel_scale,
                scale=self._scale,
                zero=self._zero,
            )
            return Chosen(*found)
        return choose_one_by_one(x, matrix, order.tolist(), self._grid, base)


def choose_one_by_one(
    x: torch.Tensor,
    matrix: torch.Tensor,
    order: list[int],
    grid: Grid,
    base: torch.Tensor | None,
) -> Chosen:
    """The definition, see Columns.choose."""
    rest = x.clone()
    codes, values, errors = (torch.empty_like(x) for _ in range(3))
    for i, k in enumerate(order):
        column = grid.column(k)
        wanted = rest[i] if base is None else torch.addcdiv(base[i], rest[i], matrix[i, i])
        codes[i] = column.codes(wanted)
        values[i] = column.values(codes[i])
        if base is None:
            torch.div(rest[i] - values[i], matrix[i, i], out=errors[i])
        else:
            torch.sub(values[i], base[i], out=errors[i])
        rest[i + 1 :].addr_(matrix[i, i + 1 :], errors[i], alpha=-1)
    return Chosen(codes, values, errors)
