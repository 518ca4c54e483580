"""Microseconds of a kernel as it runs in a model: in a CUDA graph, its weights not in L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

Timer = Callable[[Callable[[int], Any], int], float]
"""(call, copies) -> microseconds of `call(copy)`, over copies 0 to `copies` - 1 in rotation."""

COLD_BYTES = 200_000_000
"""Weights in rotation take this much: four times the largest L2 (50 MB, H100 and H200)."""

MAX_COPIES = 256
REPLAYS = (3, 25)
SPENT_MS = 10.0
"""A point is replayed for about this long, within REPLAYS."""


def copies_for(weight_bytes: int) -> int:
    """How many copies of a weight keep it out of L2."""
    return min(MAX_COPIES, max(1, -(-COLD_BYTES // max(1, weight_bytes))))


def device_timer(call: Callable[[int], Any], copies: int) -> float:
    """The median microseconds of a call on the current CUDA device.

    As a CUDA graph of one call per copy: launching from Python takes longer than a small kernel
    runs. A lone call, with nothing to rotate, is replayed with L2 flushed in between.
    """
    call(0)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    if copies == 1:
        return 1e3 * float(
            triton.testing.do_bench(graph.replay, warmup=5, rep=30, return_mode="median")
        )
    first = _replay_ms(graph)
    wanted = int(SPENT_MS / max(first, 1e-3))
    count = min(REPLAYS[1], max(REPLAYS[0], wanted))
    return 1e3 * statistics.median(_replay_ms(graph) for _ in range(count)) / copies


def wall_timer(call: Callable[[int], Any], copies: int) -> float:
    """Microseconds of the best of three calls by the clock, for a CPU: to try things out there."""
    times = []
    for turn in range(3):
        start = time.perf_counter()
        call(turn % copies)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def timer_for(device: torch.device) -> Timer:
    """The timer of a device."""
    return device_timer if device.type == "cuda" else wall_timer


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
