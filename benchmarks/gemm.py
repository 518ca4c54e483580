"""The W4A8 GEMM next to torch's bf16, fp8 and int8 GEMMs, in one run.

    python benchmarks/gemm.py --out DIR                        (writes gemm.csv and gemm.png)
    python benchmarks/gemm.py --out DIR --quick                (Llama-3-8B at few sizes)
    TRITON_INTERPRET=1 python benchmarks/gemm.py --out DIR --quick --device cpu      (tries it out)

What it prints comes from gemm_report.py, the plot from gemm_plot.py: both read the CSV.

us       median of CUDA-graph replays; each call of a graph takes another copy of the weight, as
         many as make 200 MB, so that weights come from memory as they do in a model
ratio    the rival's time by ours: above 1 we are faster; fp8 is the faster of its two forms
limit    the least time our bytes and operations take on this GPU (codegen/roofline.py) by ours
Every result of ours is compared with the integer reference, bit for bit, before and after it is
timed. `_int_mm` takes no fewer than 17 tokens: it is given 32 there, and its row says so. Rivals
leave out quantizing the activations, as we do.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from facts import provenance, write_csv

from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.roofline import TOKENS, gemm_bytes, gemm_operations, limits_of
from qoqc.codegen.tuning.choose import known
from qoqc.codegen.tuning.proving import failures
from qoqc.codegen.tuning.search import Candidate, Choice, measure, prove
from qoqc.codegen.tuning.shapes import MODELS, shapes_of
from qoqc.codegen.tuning.timing import copies_for, timer_for
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import device_key

Subset = tuple[tuple[str, ...], tuple[int, ...]]
"""Shapes and token counts."""

ALL: Subset = (tuple(MODELS), (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192))
QUICK: Subset = (("llama-3-8b",), (1, 16, 64, 256, 1024))
TINY: Subset = (("64x128", "128x256"), (1, 16))  # where kernels are interpreted
OURS: dict[str, Literal[128, -1]] = {"w4a8 g128": 128, "w4a8 per channel": -1}
FP8 = ("fp8 per tensor", "fp8 per row")
WRONG = "wrong: "
Ours = tuple[LinearSpec, Choice]
"""A kernel of ours."""

LEAST_INT8_ROWS = 32
"""torch._int_mm wants more than 16 rows."""

Row = dict[str, Any]
Call = Callable[[int], torch.Tensor]
"""Multiply with weight number `copy`."""

Rival = Callable[[int, int, torch.device], "tuple[Callable[[int], Call], int]"]
"""(N, K, device) -> (tokens -> Call, number of copies of the weight)."""


def bf16(n: int, k: int, device: torch.device) -> tuple[Callable[[int], Call], int]:
    """torch.nn.functional.linear."""
    copies = copies_for(2 * n * k)
    weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(copies)]

    def at(m: int) -> Call:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        return lambda copy: F.linear(x, weights[copy])

    return at, copies


def fp8(rowwise: bool) -> Rival:
    """torch._scaled_mm of e4m3 with fast accumulation, one scale or one per row and channel."""

    def rival(n: int, k: int, device: torch.device) -> tuple[Callable[[int], Call], int]:
        copies = copies_for(n * k)
        weights = [
            torch.randn(n, k, device=device).to(torch.float8_e4m3fn).t() for _ in range(copies)
        ]
        scale_b = torch.ones((1, n) if rowwise else (), device=device)

        def at(m: int) -> Call:
            x = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
            scale_a = torch.ones((m, 1) if rowwise else (), device=device)
            return lambda copy: torch._scaled_mm(
                x, weights[copy], scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        return at, copies

    return rival


def int8(n: int, k: int, device: torch.device) -> tuple[Callable[[int], Call], int]:
    """torch._int_mm: int32 sums and no epilogue."""
    copies = copies_for(n * k)
    weights = [
        torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8).t() for _ in range(copies)
    ]

    def at(m: int) -> Call:
        rows = max(m, LEAST_INT8_ROWS)
        x = torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8)
        return lambda copy: torch._int_mm(x, weights[copy])

    return at, copies


RIVALS: dict[str, Rival] = {
    "bf16": bf16,
    FP8[0]: fp8(rowwise=False),
    FP8[1]: fp8(rowwise=True),
    "int8 _int_mm": int8,
}


def our_rows(
    shapes: dict[tuple[int, int], str],
    sizes: Sequence[int],
    device: torch.device,
    failed: dict[Ours, str],
) -> Iterator[Row]:
    """Our kernels, as the dispatcher chooses them; one that is wrong has no time but a note."""
    key, limits = device_key(device), limits_of(device_key(device))
    for (name, group_size), (n, k), m in itertools.product(OURS.items(), shapes, sizes):
        spec = LinearSpec(k, n, group_size, torch.bfloat16)
        choice = known(GEMM, spec, m, key)
        # a kernel that hung or died in a process of its own is not run in this one
        timed = failed.get((spec, choice)) or measure(choice, spec, m, device, timer_for(device))
        moved, done = (float(f(spec).subs(TOKENS, m)) for f in (gemm_bytes, gemm_operations))
        least_us = 1e6 * max(moved / limits.read, done / limits.int8)
        row: Row = {"n": n, "k": k, "m": m, "what": name, "note": choice[0].name}
        if isinstance(timed, str):
            yield {**row, "us": math.nan, "limit": math.nan, "note": f"{WRONG}{timed}"}
        else:
            yield {**row, "us": timed.us, "limit": least_us / timed.us}


def rival_rows(
    shapes: dict[tuple[int, int], str], sizes: Sequence[int], device: torch.device
) -> Iterator[Row]:
    """torch's GEMMs; one that this GPU or torch does not run has no time but a note."""
    timer = timer_for(device)
    for (n, k), (name, rival) in itertools.product(shapes, RIVALS.items()):
        at, copies = rival(n, k, device)
        for m in sizes:
            row: Row = {"n": n, "k": k, "m": m, "what": name, "us": math.nan, "note": ""}
            try:
                row["us"] = timer(at(m), copies)
                if name.startswith("int8") and m < LEAST_INT8_ROWS:
                    row["note"] = f"padded to {LEAST_INT8_ROWS} tokens"
            except (RuntimeError, ValueError) as error:
                row["note"] = f"not available: {str(error).splitlines()[0]}"
            yield row


def add_ratios(rows: Sequence[Row]) -> None:
    """Give every row of ours its ratios to bf16 and to the faster fp8 at the same point."""
    times = {(r["n"], r["k"], r["m"], r["what"]): r["us"] for r in rows}
    for row in rows:
        if row["what"] in OURS:
            point = (row["n"], row["k"], row["m"])
            row["ratio_bf16"] = times[(*point, "bf16")] / row["us"]
            both = [times[(*point, name)] for name in FP8]
            row["ratio_fp8"] = min((t for t in both if t == t), default=math.nan) / row["us"]


def compile_all(
    shapes: dict[tuple[int, int], str], sizes: Sequence[int], device: torch.device, workers: int
) -> dict[Ours, str]:
    """Have `workers` processes compile our kernels at once, into Triton's cache on disk.

    What is wrong with those that fail there, at the least token count they are chosen for.
    """
    key = device_key(device)
    wanted: dict[Ours, int] = {}
    for group_size, (n, k), m in itertools.product(OURS.values(), shapes, sizes):
        spec = LinearSpec(k, n, group_size, torch.bfloat16)
        wanted.setdefault((spec, known(GEMM, spec, m, key)), m)
    tasks = [
        Candidate(form.name, tile, spec, (m,), device.type)
        for (spec, (form, tile)), m in wanted.items()
    ]
    found = failures(prove, tasks, workers, timeout_s=120)
    return {ours: found[index] for index, ours in enumerate(wanted) if index in found}


def save(rows: Sequence[Row], folder: Path) -> Path:
    """Write gemm.csv."""
    names = ("label", "n", "k", "m", "what", "us", "ratio_bf16", "ratio_fp8", "limit", "note")
    return write_csv(rows, names, folder / "gemm.csv")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the CSV and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", help=f"{', '.join(MODELS)}, or NxK")
    parser.add_argument("--sizes", nargs="+", type=int, help="token counts")
    parser.add_argument("--quick", action="store_true", help="one model at few sizes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    models, sizes = QUICK if args.quick else ALL
    if args.quick and device.type == "cpu":
        models, sizes = TINY
    shapes = shapes_of(args.shapes or models)
    sizes = tuple(sorted(set(args.sizes or sizes)))
    failed = compile_all(shapes, sizes, device, args.workers) if args.workers else {}
    torch.manual_seed(0)
    rows = [*our_rows(shapes, sizes, device, failed), *rival_rows(shapes, sizes, device)]
    add_ratios(rows)
    facts = provenance(device)
    for row in rows:
        row.update(label=shapes[row["n"], row["k"]], **facts)
    path = save(rows, args.out)
    beside = [
        [str(Path(__file__).with_name(f"gemm_{n}.py")), str(path)] for n in ("report", "plot")
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
