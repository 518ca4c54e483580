"""Tokens per second of `model.generate`, qoqc next to transformers' own bf16, in one run.

    python benchmarks/generate.py --shape llama-3-8b --batch 1 64        (random weights, GPU)
    python benchmarks/generate.py --model DIR --device cpu --batch 1

decode  from the difference of two generations of different length, so that prefill, sampling
        set-up and the first step cancel
prefill the time to the first token
CUDA: bf16 runs with a static cache, whose decode transformers compiles with Inductor and CUDA
graphs; qoqc runs with mode="reduce-overhead". CPU: bf16 runs eager.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import qoqc

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
}

Generate = Callable[[int], torch.Tensor]


def build(args: argparse.Namespace) -> Any:
    """The bf16 model: a checkpoint, or a shape with random weights made on the device."""
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    else:
        shape = dict(SHAPES[args.shape])
        if args.layers:
            shape["num_hidden_layers"] = args.layers
        config = AutoConfig.for_model(**shape)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().to(args.device)


def seconds(generate: Generate, tokens: int, device: str) -> float:
    """The best of three runs: the machine's own interruptions only ever add time."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        generate(tokens)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure(name: str, generate: Generate, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table: decode tokens/s, prefill tokens/s, peak memory."""
    start = time.perf_counter()
    generate(args.gen)
    compiled = time.perf_counter() - start
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    short, long = (seconds(generate, n, args.device) for n in (1, args.gen))
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0
    return {
        "what": name,
        "batch": batch,
        "prompt": args.prompt,
        "decode_tok_s": round(batch * (args.gen - 1) / (long - short), 1),
        "step_ms": round(1e3 * (long - short) / (args.gen - 1), 3),
        "prefill_tok_s": round(batch * args.prompt / short, 1),
        "peak_gib": round(peak, 2),
        "first_call_s": round(compiled, 1),
    }


def generator(model: Any, batch: int, args: argparse.Namespace, **extra: Any) -> Generate:
    """generate(n): `n` greedy tokens after a fixed random prompt, never stopping early."""
    vocab = model.config.get_text_config().vocab_size
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, vocab, (batch, args.prompt), generator=rng).to(args.device)

    def generate(tokens: int) -> torch.Tensor:
        out: torch.Tensor = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
        return out

    return generate


def main() -> None:
    """Print one row per system and batch; append them to --csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="model directory")
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--gen", type=int, default=128)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)

    model = build(args)
    longest = args.prompt + args.gen
    static = {"cache_implementation": "static"} if args.device == "cuda" else {}
    rows = []
    for batch in args.batch:
        rows.append(
            measure("transformers bf16", generator(model, batch, args, **static), batch, args)
        )
        print(rows[-1], flush=True)
    # the bf16 runs leave their static caches and graphs behind
    model._cache = None
    torch._dynamo.reset()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    mode = {"mode": "reduce-overhead"} if args.device == "cuda" else {}
    qoqc.compile(model, release=True, **mode)
    for batch in args.batch:
        rows.append(measure("qoqc W4A8KV4", generator(model, batch, args), batch, args))
        print(rows[-1], flush=True)
    for row in rows:
        row.update(provenance(args, longest))
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


def provenance(args: argparse.Namespace, longest: int) -> dict[str, str | int]:
    """What a figure means nothing without."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cuda = args.device == "cuda"
    return {
        "model": args.model or args.shape,
        "context": longest,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


if __name__ == "__main__":
    main()
