"""Plot the rows of benchmarks/ablation.py: perplexity above 16 bit by technique, a line per model.

python benchmarks/ablation_plot.py FILE.jsonl        (writes FILE.png)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt


def steps_in(rows: Sequence[dict[str, Any]]) -> dict[int, str]:
    """The names of the techniques by number, without the controls."""
    found = {row["number"]: row["step"] for row in rows if not row["control"]}
    return dict(sorted(found.items()))


def ladders(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Increases in percent by (model, text), in the order of the steps; those with every step."""
    by_number: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        for text, figures in row["texts"].items():
            by_number.setdefault((row["model"], text), {})[row["number"]] = figures["increase"]
    wanted = steps_in(rows)
    return {
        key: [found[number] for number in wanted]
        for key, found in by_number.items()
        if wanted and wanted.keys() <= found.keys()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="what ablation.py --json wrote")
    args = parser.parse_args(arguments)
    rows = [json.loads(line) for line in args.source.read_text().splitlines()]
    lines = ladders(rows)
    if not lines:
        raise SystemExit(f"{args.source}: no model has a row for every step")
    figure, axes = plt.subplots(figsize=(9, 5))
    for (model, text), increases in lines.items():
        axes.plot(range(len(increases)), increases, marker="o", label=f"{model}, {text}")
        for x, y in enumerate(increases):
            axes.annotate(f"{y:.1f}", (x, y), xytext=(0, 5), textcoords="offset points", fontsize=7)
    names = list(steps_in(rows).values())
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("perplexity above 16 bit, %")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.source.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
