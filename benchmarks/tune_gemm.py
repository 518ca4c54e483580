"""Fill a tuning table of the W4A8 GEMM on this GPU, in the form in which tables are shipped.

    python benchmarks/tune_gemm.py --shapes llama-3-8b --sizes 1 16 64 --out table.json

Candidates are compiled and first run in worker processes, where a fault or a hang does no harm;
this process times those that gave the right result. The table is written after every shape. A
table for the package belongs into codegen/tables/.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from qoqc.codegen.family import Op
from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.roofline import TOKENS, gemm_bytes, gemm_operations, limits_of
from qoqc.codegen.tuning.choose import bucket
from qoqc.codegen.tuning.proving import failures
from qoqc.codegen.tuning.search import Candidate, Choice, Timed, prove, search, shortlist
from qoqc.codegen.tuning.shapes import MODELS, shapes_of
from qoqc.codegen.tuning.table import Table, entry_key, write
from qoqc.codegen.tuning.timing import timer_for
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey, device_key

FORMATS: tuple[Literal[128, -1], ...] = (128, -1)
SIZES = [1 << power for power in range(14)]
PROVING_SHARE = 0.6
"""Of the budget: compiling takes longer than timing."""

HEADER = (
    f"{'shape':>14} {'format':>8} {'M':>5} {'us':>9} {'GB/s':>6} {'TOP/s':>6} {'limit':>6}  tile"
)


def specs_of(names: Sequence[str]) -> list[LinearSpec]:
    """Both formats of every shape; the variants of the epilogue share their entries."""
    return [
        LinearSpec(k, n, group_size, torch.bfloat16)
        for (n, k), group_size in itertools.product(shapes_of(names), FORMATS)
    ]


def candidates_of(
    op: Op, specs: Iterable[LinearSpec], sizes: Sequence[int], device: torch.device
) -> list[Candidate]:
    """What is worth trying, each once with all sizes it is for, the most promising first."""
    key = device_key(device)
    best: dict[tuple[LinearSpec, Choice], tuple[int, list[int]]] = {}
    for spec, size in itertools.product(specs, sizes):
        for rank, choice in enumerate(shortlist(op, spec, size, key)):
            known_rank, wanted = best.get((spec, choice), (rank, []))
            best[spec, choice] = min(rank, known_rank), [*wanted, size]
    ranked = sorted(best.items(), key=lambda item: item[1][0])
    return [
        Candidate(form.name, tile, spec, tuple(wanted), device.type)
        for (spec, (form, tile)), (_, wanted) in ranked
    ]


def row(spec: LinearSpec, size: int, won: Timed, device: DeviceKey) -> str:
    """A line of the printed table."""
    form, tile = won.choice
    moved, done = (float(f(spec).subs(TOKENS, size)) for f in (gemm_bytes, gemm_operations))
    limits = limits_of(device)
    seconds = won.us * 1e-6
    share = max(moved / limits.read, done / limits.int8) / seconds
    shape, packed = f"{spec.out_features}x{spec.in_features}", "g128"
    if spec.group_size == -1:
        packed = "channel"
    values = " ".join(f"{name}={value}" for name, value in tile.constexprs)
    return (
        f"{shape:>14} {packed:>8} {size:>5} {won.us:>9.2f} {moved / seconds / 1e9:>6.0f} "
        f"{done / seconds / 1e12:>6.0f} {share:>6.1%}  {form.name} {values} "
        f"warps={tile.num_warps} stages={tile.num_stages}"
    )


def tune(args: argparse.Namespace) -> Table:
    """Prove, time, print; the winners."""
    device = torch.device(args.device)
    key, end = device_key(device), time.monotonic() + args.budget
    specs, sizes = specs_of(args.shapes), sorted({bucket(size) for size in args.sizes})
    op = dataclasses.replace(GEMM, forms=tuple(f for f in GEMM.forms if f.name in args.forms))
    tasks = candidates_of(op, specs, sizes, device)
    print(
        f"{key.name}: {len(specs)} specs, {len(sizes)} sizes, {len(tasks)} candidates", flush=True
    )
    began = time.monotonic()
    failed = failures(prove, tasks, args.workers, args.timeout, PROVING_SHARE * args.budget)
    print(f"proven in {time.monotonic() - began:.0f} s, {len(failed)} failed", flush=True)
    forms = {form.name: form for form in GEMM.forms}
    excluded: dict[LinearSpec, set[Choice]] = {spec: set() for spec in specs}
    for index, reason in failed.items():
        task = tasks[index]
        excluded[task.spec].add((forms[task.form], task.tile))
        print(f"excluded: {task.form} {task.spec} {task.tile}: {reason}", flush=True)
    table: Table = {}
    print(HEADER, flush=True)
    points = list(itertools.product(specs, sizes))
    for done, (spec, size) in enumerate(points):
        left = end - time.monotonic()
        if left < 0:
            print(f"out of time, {len(points) - done} points are missing", flush=True)
            break
        won = search(
            op, spec, size, device, timer_for(device), left / (len(points) - done),
            excluded[spec],
        )[0]  # fmt: skip
        if math.isinf(won.us):
            print(f"{spec} with {size} tokens: no candidate is left", flush=True)
            continue
        form, tile = won.choice
        table[entry_key(GEMM, spec, size, key)] = (form.name, tile)
        print(row(spec, size, won, key), flush=True)
        if size == sizes[-1]:
            write(args.out, table)
    write(args.out, table)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and tune."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", default=list(MODELS), help=f"{', '.join(MODELS)}, or NxK"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="token counts")
    names = [form.name for form in GEMM.forms]
    parser.add_argument("--forms", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, required=True, help="the table to write")
    parser.add_argument("--budget", type=float, default=1500, help="seconds for everything")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a candidate may take")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(tune(args))} entries in {args.out}")


if __name__ == "__main__":
    main()
