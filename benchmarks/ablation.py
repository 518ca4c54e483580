"""Each technique of the recipe added in turn, in the paper's order: what it does to perplexity.

    python benchmarks/ablation.py MODEL CALIBRATION_TEXT TEXT... [--samples 32] [--steps 0 1 10 12]

Every row is the real quantized graph (W4A8, KV4 from its row on) next to the model's own 16-bit
one, on the first --tokens tokens of each TEXT in full windows. Steps 0 and 1 are the controls, 10
and 12 all techniques. Prints Markdown rows as they come; --json FILE appends them, and
benchmarks/ablation_plot.py draws such a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qoqc
from qoqc.artifact.survey import survey
from qoqc.calibrate.driver import calibrate
from qoqc.calibrate.perplexity import compare
from qoqc.calibrate.recipe import Recipe
from qoqc.calibrate.text import corpus
from qoqc.calibrate.windows import Windows, cut_windows, read_text
from qoqc.config import Options

PLAIN = Recipe(
    group_size=-1,
    kv_bits=8,
    kv_average=0,
    rotate=False,
    rotate_values=False,
    smooth_attention=False,
    smooth_output=False,
    reorder=False,
    correct=False,
    method="rtn",
)

CONTROLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("W4A8KV4, rounded to nearest, per channel", {"kv_bits": 4}),
    ("W4A8KV4, rounded to nearest, g128", {"kv_bits": 4, "group_size": 128}),
)
"""What `qoqc compile` does without calibration, KV4 in every layer; each stands alone."""

ADDED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("W4A8KV8, rounded to nearest, per channel", {}),
    ("+ block input rotation", {"rotate": True}),
    ("+ clip search and GPTQ", {"method": "gptq"}),
    ("+ KV4", {"kv_bits": 4}),
    ("+ SmoothAttention", {"smooth_attention": True}),
    ("+ value rotation", {"rotate_values": True}),
    ("+ output smoothing", {"smooth_output": True}),
    ("+ correction of the inputs' error", {"correct": True}),
    ("+ KV bits up to 4.5 (all, per channel)", {"kv_average": 4.5}),
    ("+ g128", {"group_size": 128}),
    ("+ reorder (all, g128)", {"reorder": True}),
)
"""The paper's order (its figure 16); what it does not show stands where it belongs."""


def recipes() -> list[tuple[str, Recipe]]:
    """The controls, then the steps, each with what those before it had."""
    rows = [(name, dataclasses.replace(PLAIN, **change)) for name, change in CONTROLS]
    recipe = PLAIN
    for name, change in ADDED:
        recipe = dataclasses.replace(recipe, **change)
        rows.append((name, recipe))
    return rows


def measure(
    model_name: str,
    number: int,
    windows: torch.Tensor,
    texts: dict[str, Windows],
    *,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Row `number` for a fresh copy of the model on `device`, compared on each text."""
    recipe = dataclasses.replace(recipes()[number][1], seed=seed)
    torch._dynamo.reset()
    model, baseline = (
        AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16).to(device).eval()
        for _ in range(2)
    )
    raw: dict[str, Any] = {"group_size": recipe.group_size, "kv_bits": recipe.kv_bits}
    row: dict[str, Any] = {"kv_layers": (), "kv_mean": recipe.kv_bits, "seconds": 0.0}
    if number >= len(CONTROLS):
        weights = survey(model, Options.parse(raw)).weights
        start = time.perf_counter()
        record = calibrate(model, windows, weights, recipe)
        row["seconds"] = time.perf_counter() - start
        row |= {"kv_layers": record.kv_layers(), "kv_mean": record.kv_mean()}
    kv_layers = row["kv_layers"]
    qoqc.compile(model, **raw, kv_layers=kv_layers, prefill_kv="quantized", glue="eager")
    for name, text in texts.items():
        found = compare(model, baseline, text)
        row[name] = {
            "baseline": found.baseline.perplexity,
            "perplexity": found.model.perplexity,
            "increase": found.increase,
            "kl": found.kl,
        }
    return row


def prepare(args: argparse.Namespace) -> tuple[torch.Tensor, dict[str, Windows]]:
    """The windows to calibrate on, and those of each text to judge on, by file name."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = {
        path.name: cut_windows(read_text(path), tokenizer, args.window, args.tokens)
        for path in args.texts
    }
    found = corpus(
        read_text(args.calibration),
        tokenizer,
        samples=args.samples,
        seq=args.window,
        seed=args.seed,
        longest=None,
        eval_text=read_text(args.texts[0]),
    )
    return found.windows, texts


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row per step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("texts", type=Path, nargs="+", help="texts to judge on")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", help="rows by number, from 0; default: all")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", type=Path, help="append a line per row")
    args = parser.parse_args(arguments)

    windows, texts = prepare(args)
    print(f"{args.model}: calibrated on {len(windows)} windows of {args.window}")
    print("| step | " + " | ".join(texts) + " | KV bits | s |")
    print("|---" * (len(texts) + 3) + "|")
    for number, (step, _) in enumerate(recipes()):
        if args.steps is not None and number not in args.steps:
            continue
        row = measure(args.model, number, windows, texts, seed=args.seed, device=args.device)
        cells = [f"{row[t]['perplexity']:.3f} ({row[t]['increase']:+.2f} %)" for t in texts]
        print(f"| {step} | {' | '.join(cells)} | {row['kv_mean']:.2f} | {row['seconds']:.0f} |")
        if args.json is not None:
            entry = {"model": Path(args.model).name, "step": step, "number": number}
            entry |= {"control": number < len(CONTROLS), "texts": {t: row[t] for t in texts}}
            entry |= {key: row[key] for key in ("kv_layers", "kv_mean", "seconds")}
            with args.json.open("a") as file:
                file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
