"""Pack a model once, load it without its 16-bit weights ever after.

    python examples/compile_model.py examples/models/llama-stories-4m stories-w4a8

    wrote stories-w4a8: 35 packed weights, 8.0 -> 3.7 MB
    loaded again: up_proj reads as NaN, 16-bit copies are gone
    Once upon a time, there was a dog named ...

The command line does the same: `qoqc compile MODEL -o DIR`, then `qoqc chat DIR`.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qoqc
from qoqc.config import Options


def main() -> None:
    """Compile, save, load, continue a text."""
    parser = argparse.ArgumentParser(description="Pack a model and load it again.")
    parser.add_argument("model", help="directory or Hub name of a decoder")
    parser.add_argument("output", help="directory to write")
    parser.add_argument("--group-size", type=int, default=128, choices=[128, -1])
    parser.add_argument("--glue", default="inductor", choices=["inductor", "eager"])
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    options = Options.parse({"group_size": args.group_size})
    manifest = qoqc.save(model, args.output, tokenizer, options=options, overwrite=True)
    before, after = manifest.bytes_before / 1e6, manifest.bytes_after / 1e6
    packed = len(manifest.weights)
    print(f"wrote {args.output}: {packed} packed weights, {before:.1f} -> {after:.1f} MB")
    del model

    model = qoqc.load(args.output, glue=args.glue)
    gone = all(model.get_parameter(name).isnan().all() for name in manifest.weights)
    print("loaded again:", "the 16-bit copies are gone" if gone else "16-bit weights are there")
    inputs = tokenizer("Once upon a time, there was a dog", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
