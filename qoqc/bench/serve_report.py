"""What a load showed: kept, written as JSON after every system, shown as a table and a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qoqc.bench.report import environment, write_json
from qoqc.bench.serve_load import PERCENTS, Load
from qoqc.bench.serve_plan import ServePlan


class ServeReport:
    """Collects the loads of one run; `path` is the JSON file, or None for no file."""

    def __init__(
        self, model: str, plan: ServePlan, settings: dict[str, Any], path: Path | None
    ) -> None:
        self.model = model
        self.plan = plan
        self.loads: list[Load] = []
        self.notes: list[str] = []
        self._settings = settings
        self._path = path

    def add(self, load: Load) -> None:
        """A system is measured."""
        self.loads.append(load)
        self._write()

    def note(self, line: str) -> None:
        """Something was left out, and why."""
        self.notes.append(line)
        self._write()

    def speedup(self) -> float | None:
        """Tokens per second of the last system over the first's; None if there are not two."""
        if len(self.loads) < 2 or not self.loads[0].tok_s:
            return None
        return self.loads[-1].tok_s / self.loads[0].tok_s

    def json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "model": self.model,
            "plan": dataclasses.asdict(self.plan),
            "settings": self._settings,
            "environment": environment(),
            "loads": [_values(load) for load in self.loads],
            "speedup": self.speedup(),
            "notes": self.notes,
        }

    def show(self, console: Console) -> None:
        """Print the table."""
        plan = self.plan
        pace = "all at once" if plan.rate is None else f"{plan.rate:g} per second (Poisson)"
        spread = f", spread {plan.spread:g}" if plan.spread else ""
        console.print(
            f"{self.model}: {plan.requests} requests, {pace}, "
            f"{plan.prompt} tokens in, {plan.gen} out{spread}",
            markup=False,
        )
        console.print(self._table())
        ratio = self.speedup()
        if ratio is not None:
            first, last = self.loads[0].system, self.loads[-1].system
            console.print(f"{last}: {ratio:.1f} x the tokens per second of {first}", markup=False)
        for load in self.loads:
            for error, count in load.errors.items():
                console.print(f"{load.system}: {count} x {error}", markup=False)
        for line in self.notes:
            console.print(f"note: {line}", markup=False)

    def _table(self) -> Table:
        goals = self.plan.goals
        table = Table()
        table.add_column("")
        for load in self.loads:
            table.add_column(load.system, justify="right")
        percents = "/".join(map(str, PERCENTS))
        restarts = ["" if load.restarted is None else str(load.restarted) for load in self.loads]
        peaks = ["" if load.peak_gib is None else f"{load.peak_gib:.2f}" for load in self.loads]
        kept = f"goodput req/s (first {goals.first * 1e3:g}, next {goals.between * 1e3:g} ms)"
        rows: dict[str, list[str]] = {
            "tok/s generated": [f"{load.tok_s:,.1f}" for load in self.loads],
            "seconds": [f"{load.seconds:.2f}" for load in self.loads],
            f"first token ms p{percents}": [_ms(load.first_ms) for load in self.loads],
            f"next token ms p{percents}": [_ms(load.between_ms) for load in self.loads],
            f"whole answer ms p{percents}": [_ms(load.whole_ms) for load in self.loads],
            kept: [f"{load.goodput:.2f} ({100 * load.good_share:.0f} %)" for load in self.loads],
            "failed": [f"{load.failed} of {load.requests}" for load in self.loads],
            "begun anew": restarts,
            "peak GiB": peaks,
        }
        for name, values in rows.items():
            if any(values):
                table.add_row(name, *values)
        return table

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, self.json())


def _values(load: Load) -> dict[str, Any]:
    """A load without the time of every token, of each request the figures made of them."""
    values = {**vars(load), "percents": PERCENTS}
    values["answered"] = [
        {
            **{"arrival": one.arrival, "prompt": one.prompt, "tokens": one.tokens},
            "first": one.first if one.times else None,
            "between": one.between,
            "whole": one.times[-1] - one.arrival if one.times else None,
            "error": one.error,
        }
        for one in load.answered
    ]
    return values


def _ms(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:,.1f}" if value < 100 else f"{value:,.0f}" for value in values)
