"""The figures of one benchmark: kept, written as JSON after every part, shown as tables."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from rich.console import Console
from rich.table import Table

import qoqc
from qoqc.bench.breakdown import Breakdown
from qoqc.bench.measure import Served, Speed

SHOWN = 12
"""Kernels of a breakdown that the table lists one by one; the JSON has all."""

Part = tuple[Breakdown, dict[str, float]]
"""A breakdown and the least time, in us, of those groups whose limit is known."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in memory: seconds it took to make or load it, device memory it holds."""

    system: str
    seconds: float
    gib: float | None


class Report:
    """Collects measurements; `path` is the JSON file, or None for no file."""

    def __init__(self, model: str, settings: dict[str, Any], path: Path | None) -> None:
        self.model = model
        self.settings = settings
        self.models: list[Loaded] = []
        self.speeds: list[Speed] = []
        self.served: list[Served] = []
        self.breakdowns: list[Part] = []
        self.notes: list[str] = []
        self._path = path

    def loaded(self, system: str, seconds: float, gib: float | None) -> None:
        """A model was made."""
        self.models.append(Loaded(system, seconds, gib))
        self._write()

    def add(self, found: Speed | Served | Part) -> None:
        """A measurement is done."""
        if isinstance(found, Speed):
            self.speeds.append(found)
        elif isinstance(found, Served):
            self.served.append(found)
        else:
            self.breakdowns.append(found)
        self._write()

    def note(self, line: str) -> None:
        """Something was left out, and why."""
        self.notes.append(line)
        self._write()

    def json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "model": self.model,
            "settings": self.settings,
            "environment": environment(),
            "models": [dataclasses.asdict(model) for model in self.models],
            "speeds": [dataclasses.asdict(speed) for speed in self.speeds],
            "served": [dataclasses.asdict(served) for served in self.served],
            "breakdowns": [
                {
                    **dataclasses.asdict(breakdown),
                    "kernels": [dataclasses.asdict(kernel) for kernel in breakdown.kernels],
                    "idle_percent": self.idle_percent(breakdown),
                    "groups": [dataclasses.asdict(group) for group in breakdown.groups()],
                    "limit_us": limits,
                }
                for breakdown, limits in self.breakdowns
            ],
            "notes": self.notes,
        }

    def show(self, console: Console) -> None:
        """Print the tables."""
        for table in (self._speed_table(), self._served_table(), *self._breakdown_tables()):
            if table.row_count:
                # above the table, where it may be wider than that
                title, table.title = table.title, None
                console.print(title, markup=False)
                console.print(table)
        for model in self.models:
            memory = "" if model.gib is None else f", {model.gib:.2f} GiB on the device"
            console.print(f"{model.system}: made in {model.seconds:.1f} s{memory}")
        for line in self.notes:
            console.print(f"note: {line}", markup=False)

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, self.json())

    def _speed_table(self) -> Table:
        names = ("", "batch", "in", "out", "step ms", "decode tok/s", "prefill tok/s")
        table = _table(f"{self.model}: speed", (*names, "peak GiB", "first call s"))
        for s in self.speeds:
            # two tokens are there to end the prefill, not to time decoding
            step = (f"{s.step_ms:.3f}", f"{s.decode_tok_s:,.1f}") if s.gen > 2 else ("", "")
            table.add_row(
                s.system,
                *map(str, (s.batch, s.prompt, s.gen)),
                *step,
                f"{s.prefill_tok_s:,.0f}",
                _gib(s.peak_gib),
                f"{s.first_call_s:.1f}",
            )
        return table

    def _served_table(self) -> Table:
        names = ("", "batch", "in", "out", "seconds", "tok/s", "peak GiB", "")
        table = _table("served: prefill and decoding together", names)
        for s in self.served:
            known = s.seconds is not None and s.tok_s is not None
            rate = (f"{s.seconds:.2f}", f"{s.tok_s:,.0f}") if known else ("", "")
            sizes = map(str, (s.batch, s.prompt, s.gen))
            table.add_row(s.system, *sizes, *rate, _gib(s.peak_gib), s.note)
        return table

    def idle_percent(self, found: Breakdown) -> float | None:
        """Part of a decode step in which no kernel runs: what the host costs, and gaps.

        Against the step time measured without a profiler; None if that was not measured.
        """
        for speed in self.speeds:
            same = (speed.system, speed.batch) == (found.system, found.batch)
            if same and speed.gen > 2:
                return 100 * (1 - found.busy_us / (1e3 * speed.step_ms))
        return None

    def _breakdown_tables(self) -> list[Table]:
        return [
            table
            for found, limits in self.breakdowns
            for table in _tables_of(found, limits, self.idle_percent(found))
        ]


def _tables_of(found: Breakdown, limits: dict[str, float], idle: float | None) -> list[Table]:
    title = (
        f"{found.system}: a decode step at batch {found.batch}, context {found.context}: "
        f"busy for {found.busy_us:,.0f} us"
    )
    if idle is not None:
        title += f", idle for {idle:.1f} % of the step"
    # what runs at the same time is counted in each, so shares may add up to more than 100 %
    groups = _table(title, ("group", "launches", "us", "share %", "limit us", "of limit %"))
    for group in found.groups():
        limit = limits.get(group.name)
        against = () if limit is None else (f"{limit:,.1f}", f"{100 * limit / group.us:.0f}")
        share = f"{100 * group.us / found.busy_us:.1f}"
        groups.add_row(group.name, f"{group.launches:.1f}", f"{group.us:,.1f}", share, *against)
    kernels = _table("its longest kernels", ("kernel", "group", "launches", "us", "us each"))
    for kernel in found.kernels[:SHOWN]:
        each = f"{kernel.us / kernel.launches:.2f}"
        row = (kernel.name[:60], kernel.group, f"{kernel.launches:.1f}", f"{kernel.us:,.1f}", each)
        kernels.add_row(*row)
    return [groups, kernels]


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file that is whole at any time; makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)


def environment() -> dict[str, str]:
    """What a figure means nothing without."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "qoqc": qoqc.__version__,
    }
