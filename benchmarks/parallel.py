"""Decode steps of a random model on one or more GPUs, every rank with its part of it.

    torchrun --nproc-per-node N benchmarks/parallel.py [--shape NAME] [--layers L] [--batch 1,64]

Run it with N = 1 and 2 and compare. The first rank prints a line of JSON per batch; --out FILE
adds them to a file of such lines. A step is the difference between generations of --gen tokens
and of one, by --gen - 1: set-up and prefill cancel.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from facts import provenance

import qoqc
from qoqc.bench.measure import Generate, System
from qoqc.bench.random_model import packed_model
from qoqc.parallel.ranks import join
from qoqc.shapes import shape

REPEATS = 3
"""Generations of which the fastest counts."""


def seconds(generate: Generate, tokens: int, device: torch.device) -> float:
    """Of one generation that all ranks begin together."""
    if dist.is_initialized():
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    generate(tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(system: System, batch: int, prompt: int, gen: int) -> dict[str, Any]:
    """A batch's figures; `alike`: whether all ranks chose the same tokens."""
    device, generate = system.device, system.generator(batch, prompt)
    first = seconds(generate, gen, device)
    seconds(generate, 1, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    short, long = (
        min(seconds(generate, tokens, device) for _ in range(REPEATS)) for tokens in (1, gen)
    )
    step = (long - short) / (gen - 1)
    chosen = generate(gen)[:, prompt:].tolist()
    others: list[Any] = [chosen]
    if dist.is_initialized():
        others = [None] * dist.get_world_size()
        dist.all_gather_object(others, chosen)
    return {
        "ranks": len(others),
        "batch": batch,
        "prompt": prompt,
        "gen": gen,
        "step_ms": 1e3 * step,
        "tok_s": batch / step,
        "prefill_s": short,
        "first_call_s": first,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30
        if device.type == "cuda"
        else None,
        "alike": all(other == chosen for other in others),
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure every batch, and give what is printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-72b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--sizes", default="{}", help="JSON of config values instead of its own")
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    sizes = {**shape(args.shape), **json.loads(args.sizes)}
    if args.layers:
        sizes["num_hidden_layers"] = args.layers
    ranks = join("auto", "cuda" if torch.cuda.is_available() else "cpu")
    model = packed_model(sizes, ranks.device, ranks=ranks)
    system = System("qoqc", qoqc.compile(model))
    rows = []
    for batch in map(int, args.batch.split(",")):
        found = measure(system, batch, args.prompt, args.gen)
        row = {"shape": args.shape, "layers": sizes["num_hidden_layers"], **found}
        rows.append({**row, **provenance(ranks.device)})
        if ranks.rank == 0:
            print(json.dumps(rows[-1]), flush=True)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    # CUDA graphs hold what belongs to the process group
    del system, model
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
