"""The ranges that weights span, and the grids that cover them in full."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qoqc.calibrate.grid import Grid
from qoqc.ir.spec import GROUP, LEVEL1_MAX, TILE_N
from qoqc.quant.pack import ceil_div
from qoqc.quant.weight import group_grid

ROWS = 2**22
"""Weights searched at a time; a candidate needs about 12 bytes for each."""

Ranges = tuple[torch.Tensor, torch.Tensor]


def plain_grid(weight: torch.Tensor, group_size: int) -> Grid:
    """The grid of quantize_weight for `weight` fp32 [N, K]: full ranges, no search."""
    if group_size != GROUP:
        low, high = channel_ranges(weight)
        return channel_grid(low, high, (high - low) / 15, anchor=0.0)
    grids = []
    for rows in row_chunks(weight):
        scale = rows.abs().amax(1) / LEVEL1_MAX if rows.shape[1] else rows.new_zeros(len(rows))
        low, high = group_ranges(groups_of(rows), scale)
        grids.append(Grid(scale, *group_grid(low, high)))
    return stack(grids)


def channel_grid(
    low: torch.Tensor, high: torch.Tensor, channel_scale: torch.Tensor, anchor: float
) -> Grid:
    """The grid of a scale whose zero keeps the minimum (anchor 0), the maximum (1), or between."""
    divisor = torch.where(channel_scale > 0, channel_scale, 1.0)
    keep_low, keep_high = -low / divisor, 15 - high / divisor
    zero = keep_low + anchor * (keep_high - keep_low)
    return Grid(channel_scale, None, torch.round(zero).clamp(0, 15)[:, None])


def channel_ranges(weight: torch.Tensor) -> Ranges:
    """Minimum and maximum [N] of weights [N, K], zero included."""
    if not weight.shape[1]:
        return weight.new_zeros(len(weight)), weight.new_zeros(len(weight))
    return weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)


def group_ranges(grouped: torch.Tensor, channel_scale: torch.Tensor) -> Ranges:
    """Minimum and maximum [N, G] of the level-1 integers of weights [N, G, 128]."""
    divisor = torch.where(channel_scale > 0, channel_scale, 1.0)[:, None]
    limits = (grouped.amin(-1), grouped.amax(-1))
    low, high = (torch.round(x / divisor).clamp(-LEVEL1_MAX, LEVEL1_MAX) for x in limits)
    return low, high


def row_chunks(weight: torch.Tensor) -> list[torch.Tensor]:
    """The output channels of `weight` [N, K] in pieces of at most about ROWS weights."""
    step = max(ROWS // max(weight.shape[1], 1) // TILE_N, 1) * TILE_N
    return [weight[i : i + step] for i in range(0, max(len(weight), 1), step)]


def stack(grids: Sequence[Grid]) -> Grid:
    """Grids of consecutive output channels as one."""
    scales = [grid.scale for grid in grids if grid.scale is not None]
    return Grid(
        torch.cat([grid.channel_scale for grid in grids]),
        torch.cat(scales) if scales else None,
        torch.cat([grid.zero for grid in grids]),
    )


def groups_of(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [N, K] as [N, G, 128], the last group padded with zeros."""
    n, k = weight.shape
    groups = ceil_div(k, GROUP)
    if k == groups * GROUP:
        return weight.view(n, groups, GROUP)
    padded = weight.new_zeros(n, groups * GROUP)
    padded[:, :k] = weight
    return padded.view(n, groups, GROUP)
