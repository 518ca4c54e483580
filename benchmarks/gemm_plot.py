"""Plot the CSV of benchmarks/gemm.py: how much faster than bf16 and fp8, over tokens, by shape.

python benchmarks/gemm_plot.py DIR/gemm.csv        (writes DIR/gemm.png)
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLUMNS = 4


def shapes_in(rows: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows that hold ratios, by label and size of the shape."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if not math.isnan(float(row["ratio_bf16"] or "nan")):
            found.setdefault(f"{row['label']} ({row['n']}, {row['k']})", []).append(row)
    return found


def draw(axes: Axes, title: str, rows: Sequence[dict[str, str]]) -> None:
    """One shape: a line per format of ours and rival."""
    for what in dict.fromkeys(row["what"] for row in rows):
        own = sorted((r for r in rows if r["what"] == what), key=lambda r: int(r["m"]))
        tokens = [int(row["m"]) for row in own]
        for rival, style in (("bf16", "-"), ("fp8", "--")):
            ratios = [float(row[f"ratio_{rival}"]) for row in own]
            axes.plot(tokens, ratios, style, marker=".", label=f"{what} / {rival}")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("tokens")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the CSV and write the PNG beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path)
    path = parser.parse_args(argv).csv
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    shapes = shapes_in(rows)
    if not shapes:
        raise SystemExit(f"{path}: no row holds a ratio; run benchmarks/gemm.py again")
    height = math.ceil(len(shapes) / COLUMNS)
    figure, grid = plt.subplots(
        height, COLUMNS, figsize=(4 * COLUMNS, 3 * height), squeeze=False, layout="constrained"
    )
    for axes, (title, own) in zip(grid.flat, shapes.items(), strict=False):
        draw(axes, title, own)
    for axes in list(grid.flat)[len(shapes) :]:
        axes.set_axis_off()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    first = rows[0]
    figure.suptitle(
        f"speed of the W4A8 GEMM by rivals' (above 1: ours is faster); {first['device']}, "
        f"torch {first['torch']}, commit {first['commit']}"
    )
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
