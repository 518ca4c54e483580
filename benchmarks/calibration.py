"""Time and memory of a calibration: a model of a named shape, random weights and text.

    python benchmarks/calibration.py --shape llama-3-8b [--layers 32] [--windows 128] [--offload]

The model is in bf16 on the device, or with --offload on the host, and a block at a time on the
device. Prints a line per layer, then one of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from qoqc.artifact.survey import survey
from qoqc.bench.random_model import dense_model
from qoqc.calibrate.driver import calibrate
from qoqc.calibrate.recipe import Recipe
from qoqc.config import Options
from qoqc.shapes import shape


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Calibrate, and give what is printed last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--sizes", default="{}", help="JSON of config values instead of its own")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024, help="tokens of each")
    parser.add_argument("--group-size", type=int, choices=(128, -1), default=128)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    sizes = {**shape(args.shape), **json.loads(args.sizes)}
    if args.layers is not None:
        sizes["num_hidden_layers"] = args.layers
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = dense_model(sizes, torch.device("cpu") if args.offload else device)
    text = torch.randint(
        sizes["vocab_size"], (args.windows, args.window), generator=torch.Generator().manual_seed(1)
    )
    weights = survey(model, Options.parse({"group_size": args.group_size})).weights
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = last = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        print(f"layer {done}/{total}: {now - last:.1f} s, {_peak_gib(device)} GiB", flush=True)
        last = now

    recipe = Recipe(group_size=args.group_size)
    record = calibrate(model, text, weights, recipe, device=device, progress=progress)
    result = {
        "shape": args.shape,
        "layers": sizes["num_hidden_layers"],
        "tokens": args.windows * args.window,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": _peak_gib(device),
        "kv_mean": record.kv_mean(),
        "refused": [str(refusal) for refusal in record.refused],
    }
    print(json.dumps(result))
    return result


def _peak_gib(device: torch.device) -> float | None:
    """Most memory allocated on the device so far; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 1)


if __name__ == "__main__":
    main()
