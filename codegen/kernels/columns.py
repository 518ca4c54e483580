"""The column loop of GPTQ and of its descent, for one block of columns: one program per few rows.

Column i takes the code nearest to what it wants to be, and its error is passed on to the columns
behind it in the block, before they choose. Definition: qoqc/calibrate/columns.py.

x, base, codes, values, errors  fp32 [B, N], B columns in the order they are visited, N output
                                channels side by side
matrix                          fp32 [B, B], row i: what an error of column i does to column j
group                           int32 [B], the group of each column
channel_scale, scale, zero      fp32 [N], [G, N], [G, N]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qoqc.codegen.kernels.pieces import round_half_even
from qoqc.quant.pack import ceil_div

COLUMNS = 128
"""Columns in a block at most: they and ROWS channels stay in registers."""

ROWS = 32
"""Output channels per program of one warp: 128 values a thread, and no barrier in the loop."""


@triton.jit(do_not_specialize=["N", "B"])
def columns_kernel(
    x_ptr,  # [B, N] fp32
    base_ptr,  # [B, N] fp32
    matrix_ptr,  # [B, B] fp32, rows `stride_m` apart
    stride_m,
    group_ptr,  # [B] int32
    channel_scale_ptr,  # [N] fp32
    scale_ptr,  # [G, N] fp32
    zero_ptr,  # [G, N] fp32
    codes_ptr,  # [B, N] fp32
    values_ptr,  # [B, N] fp32
    errors_ptr,  # [B, N] fp32
    N,
    B,
    DESCENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Choose the codes of the channels pid * ROWS + 0..ROWS-1 in all columns, one by one."""
    offs_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_b = tl.arange(0, COLUMNS)
    in_n, in_b = offs_n < N, offs_b < B
    inside = in_b[:, None] & in_n[None, :]
    x = tl.load(x_ptr + offs_b[:, None] * N + offs_n[None, :], mask=inside, other=0.0)  # [B, ROWS]
    channel_scale = tl.load(channel_scale_ptr + offs_n, mask=in_n, other=0.0)
    live = tl.where(channel_scale > 0, channel_scale, 1.0)
    for i in range(B):
        row = tl.load(matrix_ptr + i * stride_m + offs_b, mask=in_b, other=0.0)  # [B]
        diagonal = tl.load(matrix_ptr + i * stride_m + i)
        group = tl.load(group_ptr + i).to(tl.int64)
        scale = tl.load(scale_ptr + group * N + offs_n, mask=in_n, other=1.0)
        zero = tl.load(zero_ptr + group * N + offs_n, mask=in_n, other=0.0)
        # one term of the sum is not zero: it is a selection, and exact
        mine = tl.sum(tl.where((offs_b == i)[:, None], x, 0.0), axis=0)  # [ROWS]
        if DESCENT:
            base = tl.load(base_ptr + i * N + offs_n, mask=in_n, other=0.0)
            wanted = base + tl.div_rn(mine, tl.zeros_like(mine) + diagonal)
        else:
            wanted = mine
        # no code is further away, and rounding is exact below 2**22
        steps = tl.clamp(tl.div_rn(wanted, live * scale), -64.0, 64.0)
        code = tl.clamp(round_half_even(steps) + zero, 0.0, 15.0)
        value = (code - zero) * scale * channel_scale
        share = tl.div_rn(mine - value, tl.zeros_like(mine) + diagonal)
        error = value - base if DESCENT else share
        x -= tl.where(offs_b > i, row, 0.0)[:, None] * error[None, :]
        tl.store(codes_ptr + i * N + offs_n, code, mask=in_n)
        tl.store(values_ptr + i * N + offs_n, value, mask=in_n)
        tl.store(errors_ptr + i * N + offs_n, error, mask=in_n)


def launch_columns(
    x: torch.Tensor,
    base: torch.Tensor | None,
    matrix: torch.Tensor,
    *,
    group: torch.Tensor,
    channel_scale: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, values and errors [B, N]; the tensors as the module says, base for the descent alone.

    Raises ValueError for more than COLUMNS columns, other dtypes, or rows that are not contiguous.
    """
    count, n = x.shape
    floats = (x, channel_scale, scale, zero, *(() if base is None else (base,)))
    if count > COLUMNS or matrix.shape != (count, count) or matrix.stride(1) != 1:
        raise ValueError(
            f"columns: {count} columns and a matrix {tuple(matrix.shape)} with strides "
            f"{matrix.stride()}; expected at most {COLUMNS} columns and a matrix of rows"
        )
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in floats):
        raise ValueError("columns: expected contiguous fp32 tensors")
    codes, values, errors = (torch.empty_like(x) for _ in range(3))
    grid = (ceil_div(n, ROWS),)
    if count and n:
        columns_kernel[grid](
            x, x if base is None else base, matrix, matrix.stride(0), group, channel_scale, scale,
            zero, codes, values, errors, n, count,
            DESCENT=base is not None, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=1,
        )  # fmt: skip
    return codes, values, errors
