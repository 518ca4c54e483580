"""Attention over a KV4 cache next to torch's bf16 attentions, in one run.

    python benchmarks/attention.py --out DIR                (writes attention.csv and .png)
    python benchmarks/attention.py --out DIR --kinds decode --seconds 80
    python benchmarks/attention.py --out DIR --quick --device cpu          (tries it out)

What it prints comes from attention_report.py, the plot from attention_plot.py: both read the CSV.

decode   one new token for each sequence. Ours rotates q and k, quantizes and appends k and v, and
         attends: one call of kv4_decode
ragged   the same for lengths of 1 to the longest, and for equal ones of the same sum
prefill  causal, without history. Ours rotates, quantizes and appends, then runs SDPA on cuDNN
chunked  new tokens behind a history. Ours rotates and appends, then reads the history in 4 bit
Rivals only attend: they are given rotated queries and a cache that holds the new tokens. In a chunk
they see all tokens, which costs them 3 % more than causal would; of ragged lengths, the longest.

us       median of CUDA-graph replays; each call of a graph takes another cache, as many as make
         200 MB, so that they come from memory as they do in a model
tbs      terabytes per second of what a decode step of ours has to read: codes, words, q, k and v
ceiling  the part of what this GPU reads at most (codegen/roofline.py)
ratio    the rival's time by ours: above 1 we are faster
Ours is compared with the definition at every point: the first sequences, or the first chunk.
It is timed first, then one rival after another: --seconds cuts off the last of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from attention_calls import (
    EQUAL,
    OURS,
    WRONG,
    Point,
    Row,
    decode_row,
    fits,
    prefill_row,
    ragged_lengths,
)
from attention_rivals import RIVALS, rival_row
from facts import provenance, write_csv

from qoqc.codegen import dispatch
from qoqc.codegen.roofline import limits_of
from qoqc.runtime.device import device_key

DECODE = [
    Point("decode", batch, 1, context)
    for context in (1024, 4096, 16384, 65536)
    for batch in (1, 16, 64, 256)
]
LONG = [Point("decode", 1, 1, 131072)]
PREFILL = [
    Point("prefill", *shape) for shape in ((1, 8192, 8192), (8, 1024, 1024), (1, 32768, 32768))
]
POINTS = [*DECODE, *LONG, Point("ragged", 128, 1, 8192), *PREFILL, Point("chunked", 1, 1024, 17408)]
KINDS = list(dict.fromkeys(point.kind for point in POINTS))
QUICK = [
    Point("decode", 2, 1, 130), Point("ragged", 3, 1, 130), Point("prefill", 1, 70, 70),
    Point("chunked", 1, 20, 100),
]  # fmt: skip


def our_rows(point: Point, device: torch.device) -> Iterator[Row]:
    """Ours at a point; lengths of one sum beside ragged ones."""
    if point.kind not in ("decode", "ragged"):
        yield prefill_row(point, device)
        return
    if not fits(point, 2 * point.cached_bytes, device):
        yield {"what": OURS, "us": math.nan, "note": "no room for two caches"}
        return
    if point.kind == "decode":
        yield decode_row(point, device, torch.full((point.batch,), point.context, device=device))
        return
    lengths = ragged_lengths(point, device)
    yield decode_row(point, device, lengths)
    same = torch.full_like(lengths, int(lengths.sum()) // point.batch)
    yield decode_row(point, device, same, EQUAL)


def measured(
    points: Sequence[Point], rivals: Sequence[str], device: torch.device, seconds: float = math.inf
) -> Iterator[Row]:
    """All rows of all points, with what follows from their times: ours, then rival by rival.

    Rivals that are not reached in so many `seconds` have no time but a note.
    """
    ceiling = limits_of(device_key(device)).read
    end = time.monotonic() + seconds
    ours_us: dict[Point, float] = {}
    for name, point in itertools.product((OURS, *rivals), points):
        if name == OURS:
            rows = list(our_rows(point, device))
            ours_us[point] = rows[0]["us"]
        elif time.monotonic() < end:
            rows = [rival_row(name, point, device)]
        else:
            rows = [{"what": name, "us": math.nan, "note": f"not timed within {seconds:g} s"}]
        for row in rows:
            row.update(dataclasses.asdict(point))
            if row["what"] in (OURS, EQUAL) and point.new == 1:
                read = point.read_bytes
                if point.kind == "ragged":
                    total = int(ragged_lengths(point, device).sum())
                    read = read * total // (point.context * point.batch)
                row["tbs"] = read / row["us"] / 1e6
                row["ceiling"] = row["tbs"] * 1e12 / ceiling
            row["ratio"] = row["us"] / ours_us[point]
            yield row
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def save(rows: Sequence[Row], points: Sequence[Point], folder: Path) -> Path:
    """Write attention.csv, point by point."""
    names = ("kind", "batch", "new", "context", "what", "us", "tbs", "ceiling", "ratio", "note")
    places = {dataclasses.astuple(point): place for place, point in enumerate(points)}
    ordered = sorted(rows, key=lambda row: places[tuple(row[name] for name in names[:4])])
    return write_csv(ordered, names, folder / "attention.csv")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the CSV and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no rival's timing later than this"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda":
        dispatch.install()
    torch.manual_seed(0)
    points = [point for point in (QUICK if args.quick else POINTS) if point.kind in args.kinds]
    facts = provenance(device)
    rows: list[Row] = []
    path = save(rows, points, args.out)
    with torch.no_grad():
        for row in measured(points, args.rivals, device, args.seconds):
            rows.append({**row, **facts})
            save(rows, points, args.out)  # what a crash at a later point must not take along
    beside = [
        [str(Path(__file__).with_name(f"attention_{n}.py")), str(path)] for n in ("report", "plot")
    ]
    subprocess.run([sys.executable, *beside[0]], check=True)
    if wrong := [row for row in rows if row["note"].startswith(WRONG)]:
        raise SystemExit(f"{len(wrong)} results are wrong: {wrong}")
    if importlib.util.find_spec("matplotlib"):
        subprocess.run([sys.executable, *beside[1]], check=True)
    else:
        print(f"no plot without matplotlib: pip install 'qoqc[bench]', then {' '.join(beside[1])}")


if __name__ == "__main__":
    main()
