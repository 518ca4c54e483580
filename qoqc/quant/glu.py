"""The order of rows in which one tile of a GEMM holds a gate and the up that it multiplies."""

from __future__ import annotations

import torch

TURN = 8
"""Rows of gate, then of up: both lie in one thread's registers of an m16 tensor core tile."""


def interleaved(width: int) -> torch.Tensor:
    """Which row of the stacked [gate; up], each of `width` rows, comes where: int64 [2 * width].

    Raises ValueError where `width` is no multiple of 8.
    """
    if width % TURN:
        raise ValueError(f"gate and up of {width} rows cannot take turns of {TURN}")
    rows = torch.arange(2 * width).view(2, width // TURN, TURN)
    return rows.transpose(0, 1).reshape(-1)


def in_turns(values: torch.Tensor) -> torch.Tensor:
    """The gate's values and then the up's, [2 * width], in the order of `interleaved`."""
    return values.view(2, -1, TURN).transpose(0, 1).reshape(-1)


def apart(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up) [..., width] of the last axis of y [..., 2 * width] in turns of 8."""
    turns = y.unflatten(-1, (-1, 2, TURN))
    return turns[..., 0, :].flatten(-2), turns[..., 1, :].flatten(-2)
