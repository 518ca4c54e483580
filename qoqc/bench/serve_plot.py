"""The picture of a load: tokens over time, and how long first and next tokens took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qoqc.bench.serve_load import Load
from qoqc.bench.serve_report import ServeReport

BINS = 60
"""Bars' worth of time over the longest load."""


def plot(report: ServeReport, path: Path) -> None:
    """Write a PNG of three panels, a line per system in each."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    rates, first, between = figure.subplots(1, 3)
    _rates(rates, report.loads)
    goals = report.plan.goals
    _shares(first, report.loads, _first, goals.first, "time to the first token, ms")
    _shares(between, report.loads, _between, goals.between, "time to the next token, ms")
    figure.suptitle(f"{report.model}: {report.plan.requests} requests")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _rates(axes: Axes, loads: Sequence[Load]) -> None:
    longest = max((load.seconds for load in loads), default=0.0)
    edges = np.linspace(0, max(longest, 1e-3), BINS + 1)
    for load in loads:
        # over HTTP a piece may be several tokens: each counts as its share of them
        times = [np.asarray(one.times) for one in load.answered if one.error is None]
        sizes = [
            np.full(len(one.times), one.timed / len(one.times))
            for one in load.answered
            if one.error is None
        ]
        if times:
            counts, _ = np.histogram(np.concatenate(times), edges, weights=np.concatenate(sizes))
            axes.stairs(counts / np.diff(edges), edges, label=load.system)
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens per second")
    axes.legend()


def _shares(
    axes: Axes, loads: Sequence[Load], pick: Callable[[Load], np.ndarray], goal: float, label: str
) -> None:
    for load in loads:
        values = np.sort(pick(load)) * 1e3
        if len(values):
            axes.plot(values, np.linspace(0, 1, len(values)), label=load.system)
    axes.axvline(goal * 1e3, color="gray", linestyle=":", label="goal")
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("share below")
    axes.legend()


def _first(load: Load) -> np.ndarray:
    return np.asarray([one.first for one in load.answered if one.error is None])


def _between(load: Load) -> np.ndarray:
    gaps = [np.diff(one.times) for one in load.answered if one.error is None]
    return np.concatenate(gaps) if gaps else np.empty(0)
