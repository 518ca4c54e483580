"""Artifacts of tiny models, and their way into a layer as models of vLLM load it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

import qoqc
from qoqc.config import Options
from qoqc.testing import tiny_model

MAPPING = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
FIELDS = ("qweight", "channel_scale", "group_word", "channel_zero", "bias")


def saved(directory: Path, family: str = "llama", **options: Any) -> Path:
    model = tiny_model(family, torch.bfloat16)
    qoqc.save(model, directory, options=Options.parse(options))
    return directory


def config_of(vllm: SimpleNamespace, directory: Path, mapping: dict[str, list[str]]) -> Any:
    """As VllmConfig makes it, and the model class completes it."""
    stored = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = vllm.methods[stored["quant_method"]].from_config(stored)
    config.maybe_update_config(str(directory), hf_config=None, revision=None)
    config.packed_modules_mapping = mapping
    return config


def fill(layer: Any, directory: Path, above: str, children: list[str]) -> None:
    """Load the stored tensors of `children` into the layer, as a model of vLLM does."""
    shards: list[Any] = ["q", "k", "v"] if len(children) == 3 else list(range(len(children)))
    biases = []
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
        for child, shard in zip(children, shards, strict=True):
            for field in FIELDS:
                name = f"{above}.{child}.{field}"
                if name not in stored:
                    continue
                if field == "bias":
                    biases.append(file.get_tensor(name))
                else:
                    layer.load(field, file.get_tensor(name), *([shard] if children[1:] else []))
    if biases:
        layer.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False)
    layer.quant_method.process_weights_after_loading(layer)


def activations(columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(2, 5, columns, generator=generator).to(dtype)
