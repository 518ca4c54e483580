"""Print the CSV of benchmarks/attention.py: every point, and where a rival is faster.

python benchmarks/attention_report.py DIR/attention.csv
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OURS, EQUAL = "kv4", "kv4, equal lengths"
NUMBERS = ("us", "tbs", "ceiling", "ratio")
SIZES = ("batch", "new", "context")

Row = dict[str, Any]
Key = tuple[str, int, int, int]
"""Kind, batch, new tokens, context."""


def read(path: Path) -> list[Row]:
    """The rows with numbers as numbers; an empty field is NaN."""
    with path.open(newline="") as file:
        return [
            {
                **row,
                **{name: int(row[name]) for name in SIZES},
                **{name: float(row[name] or math.nan) for name in NUMBERS},
            }
            for row in csv.DictReader(file)
        ]


def points(rows: Sequence[Row]) -> dict[Key, dict[str, Row]]:
    """The rows of each point, by system."""
    found: dict[Key, dict[str, Row]] = {}
    for row in rows:
        key = (row["kind"], *(row[name] for name in SIZES))
        found.setdefault(key, {})[row["what"]] = row
    return found


def losses(rows: Sequence[Row]) -> list[str]:
    """The points where a rival is faster than ours."""
    return [
        f"{row['kind']} B={row['batch']} new={row['new']} context={row['context']}: "
        f"{row['what']} x{row['ratio']:.2f}"
        for row in rows
        if row["what"] not in (OURS, EQUAL) and row["ratio"] < 1
    ]


def report(rows: Sequence[Row]) -> Iterator[str]:
    """The lines to print."""
    systems = [w for w in dict.fromkeys(row["what"] for row in rows) if w not in (OURS, EQUAL)]
    head = " ".join(f"{what:>9} {'ratio':>6}" for what in systems)
    left = f"{'kind':>8} {'B':>4} {'new':>6} {'context':>8} {'kv4 us':>9}"
    yield f"{left} {'TB/s':>6} {'of':>6} {head}"
    for (kind, batch, new, context), by in points(rows).items():
        own = by[OURS]
        rivals = " ".join(
            f"{by[w]['us']:>9.1f} {by[w]['ratio']:>6.2f}" if w in by else " " * 16 for w in systems
        )
        yield (
            f"{kind:>8} {batch:>4} {new:>6} {context:>8} {own['us']:>9.1f} {own['tbs']:>6.2f} "
            f"{own['ceiling']:>6.1%} {rivals}"
        )
        if EQUAL in by:
            slower = own["us"] / by[EQUAL]["us"]
            yield f"{'':>8} equal lengths of the same sum {by[EQUAL]['us']:.1f} us: x{slower:.2f}"
    notes = {f"{row['what']}: {row['note']}": None for row in rows if row["note"]}
    yield from notes
    yield f"slower than a rival: {'; '.join(losses(rows)) or 'nowhere'}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report of a CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path)
    rows = read(parser.parse_args(argv).csv)
    if not rows:
        raise SystemExit("the CSV holds no rows; run benchmarks/attention.py again")
    for line in report(rows):
        print(line)
    print(", ".join(f"{name} {rows[0][name]}" for name in ("device", "torch", "triton", "commit")))


if __name__ == "__main__":
    main()
