"""Print the CSV of benchmarks/gemm.py: every point, the sums over a layer, where we are slower.

python benchmarks/gemm_report.py DIR/gemm.csv
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qoqc.codegen.tuning.shapes import MODELS

SUMMED = "llama-3-8b"
NUMBERS = ("us", "ratio_bf16", "ratio_fp8", "limit")

Row = dict[str, Any]
Point = tuple[int, int, int]
"""N, K, M."""


def read(path: Path) -> list[Row]:
    """The rows with numbers as numbers; an empty field is NaN."""
    with path.open(newline="") as file:
        return [
            {
                **row,
                **{name: int(row[name]) for name in ("n", "k", "m")},
                **{name: float(row[name] or math.nan) for name in NUMBERS},
            }
            for row in csv.DictReader(file)
        ]


def points(rows: Sequence[Row]) -> dict[Point, dict[str, Row]]:
    """The rows of each point, by system."""
    found: dict[Point, dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["n"], row["k"], row["m"]), {})[row["what"]] = row
    return found


def ours(rows: Sequence[Row]) -> list[str]:
    """Our systems: those with ratios, in the order of the file."""
    return list(dict.fromkeys(row["what"] for row in rows if row["what"].startswith("w4a8")))


def sums(rows: Sequence[Row], model: str) -> Iterator[tuple[int, dict[str, float]]]:
    """(tokens, microseconds by system) of a model's linears, where all of them were measured."""
    at = points(rows)
    shapes = MODELS[model].values()
    for m in sorted({row["m"] for row in rows}):
        measured = [at[(*shape, m)] for shape in shapes if (*shape, m) in at]
        if len(measured) == len(shapes):
            yield m, {what: sum(by[what]["us"] for by in measured) for what in measured[0]}


def losses(rows: Sequence[Row], rival: str) -> list[str]:
    """The points of ours that are slower than `rival` ("bf16" or "fp8")."""
    return [
        f"{row['what']} ({row['n']}, {row['k']}) M={row['m']}: x{row[f'ratio_{rival}']:.2f}"
        for row in rows
        if row[f"ratio_{rival}"] < 1
    ]


def report(rows: Sequence[Row]) -> Iterator[str]:
    """The lines to print."""
    systems, own = list(dict.fromkeys(row["what"] for row in rows)), ours(rows)
    head = " ".join(f"{what:>16}" for what in systems)
    ratios = " ".join(f"{what}: bf16/us fp8/us limit" for what in own)
    yield f"{'N':>6} {'K':>6} {'M':>6} {head}   {ratios}"
    for (n, k, m), by in points(rows).items():
        times = " ".join(f"{by[what]['us']:>16.2f}" for what in systems)
        parts = " ".join(
            f"{by[w]['ratio_bf16']:>18.2f} {by[w]['ratio_fp8']:>6.2f} {by[w]['limit']:>6.1%}"
            for w in own
        )
        yield f"{n:>6} {k:>6} {m:>6} {times} {parts}"
    for m, total in sums(rows, SUMMED):
        times = " ".join(f"{total[what]:>16.2f}" for what in systems)
        yield f"sum of {SUMMED} {m:>6} {times}"
    notes = {f"{row['what']}: {row['note']}": None for row in rows if row["what"] not in own}
    yield from (note for note in notes if not note.endswith(": "))
    for rival in ("bf16", "fp8"):
        lost = losses(rows, rival)
        yield f"slower than {rival}: {', '.join(lost) or 'nowhere'}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report of a CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path)
    rows = read(parser.parse_args(argv).csv)
    if not rows:
        raise SystemExit("the CSV holds no rows; run benchmarks/gemm.py again")
    for line in report(rows):
        print(line)
    facts = ("device", "torch", "triton", "commit")
    print(", ".join(f"{name} {rows[0][name]}" for name in facts))


if __name__ == "__main__":
    main()
