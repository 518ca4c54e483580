"""Plot the CSV of benchmarks/attention.py: decode times over context by batch, and the prefills.

python benchmarks/attention_plot.py DIR/attention.csv        (writes DIR/attention.png)
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, str]


def draw_decode(axes: Axes, batch: int, rows: Sequence[Row]) -> None:
    """Times of one batch: a line per system."""
    for what in dict.fromkeys(row["what"] for row in rows):
        own = sorted((r for r in rows if r["what"] == what), key=lambda r: int(r["context"]))
        axes.plot(
            [int(row["context"]) for row in own],
            [float(row["us"]) for row in own],
            marker=".",
            label=what,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(f"decode, batch {batch}", fontsize=9)
    axes.set_xlabel("context")
    axes.set_ylabel("us")


def draw_rest(axes: Axes, rows: Sequence[Row]) -> None:
    """Ratios of the other points: a group of bars each, our time by rivals'."""
    systems = [w for w in dict.fromkeys(r["what"] for r in rows) if not w.startswith("kv4")]
    labels = list(dict.fromkeys(_label(row) for row in rows))
    for number, what in enumerate(systems):
        ratios = {_label(r): float(r["ratio"]) for r in rows if r["what"] == what}
        places = [index + number / (len(systems) + 1) for index in range(len(labels))]
        axes.bar(
            places,
            [ratios.get(label, float("nan")) for label in labels],
            width=1 / (len(systems) + 1),
            label=what,
        )
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, fontsize=7)
    axes.set_title("rival's time by ours (above 1: ours is faster)", fontsize=9)
    axes.legend(fontsize=7)


def _label(row: Row) -> str:
    return f"{row['kind']}\n{row['batch']} x {row['new']}\nof {row['context']}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the CSV and write the PNG beside it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path)
    path = parser.parse_args(argv).csv
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    decode = [row for row in rows if row["kind"] == "decode"]
    rest = [row for row in rows if row["kind"] != "decode"]
    batches = sorted({int(row["batch"]) for row in decode})
    if not rows:
        raise SystemExit(f"{path}: no rows; run benchmarks/attention.py again")
    count = len(batches) + bool(rest)
    figure, grid = plt.subplots(
        1, count, figsize=(4.5 * count, 3.6), squeeze=False, layout="constrained"
    )
    for axes, batch in zip(grid.flat, batches, strict=False):
        draw_decode(axes, batch, [row for row in decode if int(row["batch"]) == batch])
        axes.legend(fontsize=7)
    if rest:
        draw_rest(grid.flat[count - 1], rest)
    first = rows[0]
    figure.suptitle(
        f"attention over a KV4 cache; {first['device']}, torch {first['torch']}, "
        f"commit {first['commit']}"
    )
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
