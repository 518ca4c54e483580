"""Perplexity of the real quantized graph, next to the 16-bit model's.

    python benchmarks/perplexity.py MODEL TEXT [--group-size -1] [--kv-bits 16] [--reference]

Windows do not overlap and use no cache; keys and values are rounded as a cache would round them
(prefill_kv="quantized"), so the figure is that of a model that decodes. --reference adds a model
that shares no graph code: fp32, eager, weights and activations rounded by hooks on its linears.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import qoqc
from qoqc.calibrate.perplexity import evaluate
from qoqc.calibrate.windows import cut_windows, read_text
from qoqc.quant.activation import quantize_act
from qoqc.quant.kv import fake_quantize_kv
from qoqc.quant.weight import dequantize_weight, quantize_weight


def fake_quantize(model: Any, group_size: Any, kv_bits: int) -> None:
    """Round weights, activations, keys and values of an eager model; the head stays as it is."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.weight.data = dequantize_weight(quantize_weight(module.weight, group_size))
            module.register_forward_pre_hook(_round_activation)

    def rounded(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        if kv_bits != 16:
            k, v = fake_quantize_kv(k, kv_bits), fake_quantize_kv(v, kv_bits)
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("kv_rounded", rounded)
    AttentionMaskInterface.register("kv_rounded", sdpa_mask)
    model.set_attn_implementation("kv_rounded")


def _round_activation(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    xq, scale, _ = quantize_act(inputs[0])
    return (xq.float() * scale[..., None],)


def main() -> None:
    """Print the perplexity of the 16-bit model, of the quantized one, of the reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("text", type=Path, help="plain text file")
    parser.add_argument("--group-size", type=int, default=128, choices=(128, -1))
    parser.add_argument("--kv-bits", type=int, default=4, choices=(4, 8, 16))
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--glue", default="inductor", choices=("inductor", "eager"))
    parser.add_argument("--reference", action="store_true")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = cut_windows(read_text(args.text), tokenizer, args.window, args.tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.eval().to(args.device)

    before = evaluate(model, windows).perplexity
    print(f"16 bit   {before:8.3f}")
    qoqc.compile(
        model,
        group_size=args.group_size,
        kv_bits=args.kv_bits,
        prefill_kv="quantized",
        glue=args.glue,
    )
    after = evaluate(model, windows).perplexity
    print(f"W4A8KV{args.kv_bits} {after:8.3f}  {100 * (after / before - 1):+.2f} %")
    if args.reference:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        model.eval().to(args.device)
        fake_quantize(model, args.group_size, args.kv_bits)
        rounded = evaluate(model, windows).perplexity
        print(f"reference {rounded:8.3f}  {100 * (rounded / before - 1):+.2f} %")


if __name__ == "__main__":
    main()
