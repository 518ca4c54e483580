"""Well-known decoders by name: what their configs say about sizes, for benchmarks and tuning."""

from __future__ import annotations

from typing import Any

from qoqc.errors import OptionError

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "qwen2.5-72b": {
        "model_type": "qwen2",
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
}
"""Arguments of AutoConfig.for_model, as in the models' config.json; none ties its head."""


def shape(name: str) -> dict[str, Any]:
    """A copy of the sizes of a model. Raises OptionError for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise OptionError(f"shape {name!r}: expected one of {', '.join(SHAPES)}")
    return dict(SHAPES[name])


def linears(sizes: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of a layer's linears, once q, k, v and gate, up are merged."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    head = sizes.get("head_dim", hidden // heads)
    return {
        "qkv": ((heads + 2 * kv_heads) * head, hidden),
        "o": (hidden, heads * head),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
