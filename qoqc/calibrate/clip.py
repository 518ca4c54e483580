"""Clip search: scales and zeros with the least output error, on the grid the kernels use.

The error of an output channel with weight error e is `e @ H @ e` (H of calibrate/hessian.py). It
is a sum over output channels, so each finds its own best, and weighting channels (by the queries
that read a key channel, for the error of the attention behind it) would change no choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qoqc.calibrate.grid import Grid
from qoqc.calibrate.ranges import (
    Ranges,
    channel_grid,
    channel_ranges,
    group_ranges,
    groups_of,
    row_chunks,
    stack,
)
from qoqc.ir.spec import GROUP, LEVEL1_MAX
from qoqc.quant.pack import ceil_div
from qoqc.quant.weight import group_grid

LEAST = 0.6
"""The smallest level-2 scale tried, as a part of that of the full range."""

Scored = tuple[torch.Tensor, Grid]


def search_grouped(weight: torch.Tensor, hessian: torch.Tensor, ratios: Sequence[float]) -> Grid:
    """The best g128 grid for `weight` fp32 [N, K] under `hessian` fp32 [K, K].

    First level 1, with full level-2 ranges: channel_scale is absmax / 119 times one of `ratios`.
    Then level 2: every whole-number scale from one above that of the full range down to LEAST of
    it, with the zero that keeps the group's minimum, its maximum, or the middle. The error is
    taken within groups; with ratios that begin with 1 it is at most that of the full range.
    """
    blocks = _diagonal_blocks(hessian)
    pieces = [_grouped_rows(rows, blocks, ratios) for rows in row_chunks(weight)]
    return stack(pieces)


def search_per_channel(
    weight: torch.Tensor, hessian: torch.Tensor, ratios: Sequence[float]
) -> Grid:
    """The best per-channel grid for `weight` fp32 [N, K] under `hessian` fp32 [K, K].

    channel_scale is (max - min) / 15 times one of `ratios`, the zero that which keeps the minimum,
    the maximum, or the middle. The error is that of whole output channels, at most that of
    plain_grid if 1 is among the ratios.
    """
    return stack([_channel_rows(rows, hessian, ratios) for rows in row_chunks(weight)])


def _grouped_rows(weight: torch.Tensor, blocks: torch.Tensor, ratios: Sequence[float]) -> Grid:
    """search_grouped for a few output channels."""
    grouped = groups_of(weight)
    full = weight.abs().amax(1) / LEVEL1_MAX
    best: Scored | None = None
    for ratio in ratios:
        channel_scale = full * ratio
        x = _level1_steps(grouped, channel_scale)
        scale, zero = group_grid(*group_ranges(grouped, channel_scale))
        error = _group_error(x, scale, zero, blocks).sum(1) * channel_scale.square()
        found = error, Grid(channel_scale, scale, zero)
        best = found if best is None else _better(best, found)
    assert best is not None, "at least one ratio"
    channel_scale = best[1].channel_scale
    x = _level1_steps(grouped, channel_scale)
    low, high = group_ranges(grouped, channel_scale)
    return Grid(channel_scale, *_best_level2(x, low, high, blocks))


def _level1_steps(grouped: torch.Tensor, channel_scale: torch.Tensor) -> torch.Tensor:
    """Weights [N, G, 128] in steps of their channel's scale, [G, N, 128] as the blocks take them.

    An error in these units is the real one over channel_scale: the same for a whole channel.
    """
    divisor = torch.where(channel_scale > 0, channel_scale, 1.0)
    return grouped.div(divisor[:, None, None]).transpose(0, 1).contiguous()


def _group_error(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """The output error [N, G] of rounding x [G, N, 128] to level-2 grids [N, G]."""
    s, z = scale.t()[..., None], zero.t()[..., None]
    delta = x.div(s).round_().add_(z).clamp_(0, 15).sub_(z).mul_(s).sub_(x)
    return torch.bmm(delta, blocks).mul_(delta).sum(-1).t()


def _best_level2(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, blocks: torch.Tensor
) -> Ranges:
    """Scale and zero [N, G] of the least error of each group."""
    candidates = level2_candidates(low, high)
    scale, zero = next(candidates)
    error = _group_error(x, scale, zero, blocks)
    for other_scale, other_zero in candidates:
        other = _group_error(x, other_scale, other_zero, blocks)
        better = other < error
        error = torch.where(better, other, error)
        scale = torch.where(better, other_scale, scale)
        zero = torch.where(better, other_zero, zero)
    return scale, zero


def level2_candidates(low: torch.Tensor, high: torch.Tensor) -> Iterator[Ranges]:
    """Scale and zero of groups with int8 range [low, high]: that of the full range first.

    All keep `zero * scale <= 128` and `(15 - zero) * scale <= 127` (quant/weight.py).
    """
    plain, zero = group_grid(low, high)
    yield plain, zero
    low, high = low.clamp(max=0), high.clamp(min=0)
    floor = (plain * LEAST).ceil()
    deepest = int((plain - floor).max()) if plain.numel() else 0
    for less in (-1, *range(1, deepest + 1)):
        scale = torch.maximum((plain - less).clamp(1, 16), floor)
        keep_low, keep_high = torch.round(-low / scale), 15 - torch.round(high / scale)
        least = (15 - 127 / scale).ceil().clamp(min=0)
        most = (128 / scale).floor().clamp(max=15)
        # with more room than the range needs, where it lies is of little matter
        middle = torch.round((keep_low + keep_high) / 2)
        for zero in (middle,) if less < 0 else (middle, keep_low, keep_high):
            yield scale, torch.minimum(torch.maximum(zero, least), most)


def _channel_rows(weight: torch.Tensor, hessian: torch.Tensor, ratios: Sequence[float]) -> Grid:
    """search_per_channel for a few output channels."""
    low, high = channel_ranges(weight)

    best: Scored | None = None
    for ratio in ratios:
        # an outlier on one side is cut by keeping the other
        for anchor in (0.0, 0.5, 1.0):
            grid = channel_grid(low, high, (high - low) / 15 * ratio, anchor)
            delta = grid.values(grid.nearest(weight)) - weight
            found = (delta @ hessian).mul_(delta).sum(1), grid
            best = found if best is None else _better(best, found)
    assert best is not None, "at least one ratio"
    return best[1]


def _better(
    a: tuple[torch.Tensor, Grid], b: tuple[torch.Tensor, Grid]
) -> tuple[torch.Tensor, Grid]:
    """Each output channel's grid of the smaller error [N]; the earlier one where they are equal."""
    (error, old), (other, new) = a, b
    take = other < error
    wide = take[:, None]
    scale = None
    if old.scale is not None and new.scale is not None:
        scale = torch.where(wide, new.scale, old.scale)
    grid = Grid(
        torch.where(take, new.channel_scale, old.channel_scale),
        scale,
        torch.where(wide, new.zero, old.zero),
    )
    return torch.where(take, other, error), grid


def _diagonal_blocks(hessian: torch.Tensor) -> torch.Tensor:
    """The blocks [G, 128, 128] of groups with themselves, zero where K is padded."""
    k = hessian.shape[0]
    groups = ceil_div(k, GROUP)
    blocks = hessian.new_zeros(groups, GROUP, GROUP)
    for group in range(groups):
        part = slice(group * GROUP, min(k, (group + 1) * GROUP))
        size = part.stop - part.start
        blocks[group, :size, :size] = hessian[part, part]
    return blocks
