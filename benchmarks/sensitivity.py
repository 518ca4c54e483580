"""How far roundings alone move a quantized model's logits: what any two devices may differ by.

    python benchmarks/sensitivity.py [MODEL] [--steps 60]

The integer reference on the CPU, bf16, g128, KV4, is fed its own greedy tokens again: with the last
bit flipped of a share of the norms' weights, and with fp32 in place of bf16 between the integers.
A device that sums in another order does the like, everywhere at once.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import qoqc
from qoqc.decode.probe import probe_kv

MODEL = Path(__file__).parents[1] / "examples" / "models" / "llama-stories-4m"
PROMPT = 16
SHARES = (1e-3, 1e-2, 1e-1)


def reference(model: Path, dtype: torch.dtype, share: float = 0.0) -> Any:
    """The compiled model; `share` of its layers' norm weights with the last bit flipped."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    norms = [p for name, p in loaded.named_parameters() if name.endswith("norm.weight")]
    with torch.no_grad():
        for weight in norms if share else []:
            flip = torch.rand(weight.shape, generator=generator) < share
            flipped = (weight.view(torch.int16) ^ 1).view(weight.dtype)
            weight.copy_(torch.where(flip, flipped, weight))
    return qoqc.compile(loaded, group_size=128, kv_bits=4, glue="eager")


def logits(model: Any, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """The logits [T - start, V] before each token from `start` on, fed `tokens` [1, T]."""
    cache = qoqc.KV4Cache(model.config, tokens.shape[1], 4)
    cache.allocate(1, probe_kv(model), model.device)
    found = []
    with torch.no_grad():
        for first, last in itertools.pairwise([0, *range(start, tokens.shape[1])]):
            out = model(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True)
            found.append(out.logits[0, -1].double())
    return torch.stack(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the relative distance of the logits, its mean over steps and the first step's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(argv)
    model = reference(args.model, torch.bfloat16)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    tokens = model.generate(
        prompt, max_new_tokens=args.steps, min_new_tokens=args.steps, do_sample=False
    )
    expected = logits(model, tokens, PROMPT)

    def show(what: str, other: Any) -> None:
        distance = (logits(other, tokens, PROMPT) - expected).norm(dim=1) / expected.norm(dim=1)
        print(f"{what:44} mean {distance.mean():.1%}  first step {distance[0]:.1%}", flush=True)

    show("the same again", reference(args.model, torch.bfloat16))
    for share in SHARES:
        what = f"the last bit of {share:.1%} of the norms' weights"
        show(what, reference(args.model, torch.bfloat16, share))
    show("fp32 between the integers", reference(args.model, torch.float32))


if __name__ == "__main__":
    main()
