"""The choice of form and tile for a launch: tables, then a search if asked, then heuristics."""

from __future__ import annotations

from typing import Any, Literal

import torch

from qoqc.codegen.family import Family, Op, Tile
from qoqc.codegen.tuning import table
from qoqc.codegen.tuning.search import search
from qoqc.codegen.tuning.timing import Timer, device_timer
from qoqc.runtime.device import DeviceKey, device_key

Mode = Literal["heuristic", "search"]

MAX_BUCKET = 8192

BUCKETS = tuple(1 << power for power in range(MAX_BUCKET.bit_length()))
"""What `bucket` gives."""

BUDGET_S = 120.0
"""Seconds one search may take: candidates come most promising first, most are compiled anew."""


def bucket(size: int) -> int:
    """The token count that stands for `size`: the next power of two, 8192 at most."""
    return min(MAX_BUCKET, 1 << max(0, size - 1).bit_length())


def known(op: Op, spec: Any, size: int, device: DeviceKey) -> tuple[Family, Tile]:
    """The form and tile for launches of about `size` tokens, without a search."""
    size = bucket(size)
    return table.look_up(op, spec, size, device) or op.heuristic(spec, size, device)


def choose(
    op: Op,
    spec: Any,
    size: int,
    device: torch.device,
    mode: Mode,
    timer: Timer = device_timer,
) -> tuple[Family, Tile]:
    """The form and tile for launches of about `size` tokens: always an answer, never an error.

    The tables, see table.look_up; where none knows and mode is "search" a search, whose
    winner the user's table keeps (not while a CUDA graph is being captured); else the heuristic.
    """
    size, key = bucket(size), device_key(device)
    found = table.look_up(op, spec, size, key)
    if found is not None:
        return found
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if mode == "heuristic" or capturing:
        return op.heuristic(spec, size, key)
    form, tile = search(op, op.timed(spec), size, device, timer, BUDGET_S)[0].choice
    table.record(table.entry_key(op, spec, size, key), form, tile)
    return form, tile
