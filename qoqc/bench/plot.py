"""The picture of a report: decode speed by batch, and what a decode step consists of."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qoqc.bench.report import Part, Report


def plot(report: Report, path: Path) -> None:
    """Write a PNG with a panel of speeds and one for each breakdown."""
    figure = Figure(figsize=(5 * (1 + len(report.breakdowns)), 4), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(report.breakdowns), squeeze=False)[0]
    _speeds(first, report)
    for axes, part in zip(others, report.breakdowns, strict=True):
        _breakdown(axes, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _speeds(axes: Axes, report: Report) -> None:
    decoded = [speed for speed in report.speeds if speed.gen > 2]
    for system in dict.fromkeys(speed.system for speed in decoded):
        own = sorted((s for s in decoded if s.system == system), key=lambda s: s.batch)
        axes.plot([s.batch for s in own], [s.decode_tok_s for s in own], marker="o", label=system)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch")
    axes.set_ylabel("decoded tokens per second")
    axes.set_title(report.model)
    if decoded:
        axes.legend()


def _breakdown(axes: Axes, part: Part) -> None:
    found, limits = part
    groups = found.groups()[::-1]
    names = [group.name for group in groups]
    axes.barh(names, [group.us for group in groups])
    known = [(name, limits[name]) for name in names if name in limits]
    axes.plot([us for _, us in known], [name for name, _ in known], "k|", markersize=20)
    axes.set_xlabel("us per step (line: limit)")
    axes.set_title(f"batch {found.batch}, context {found.context}")
