"""The words of `qoqc inspect`."""

from __future__ import annotations

import dataclasses

import pytest

from qoqc.passes.structure.describe import layer_rows, stream_line
from qoqc.passes.structure.discover import structure_of
from qoqc.testing import tiny_model

ROWS = {
    "llama": [
        ("0-1 (2)", "4/2 heads of 32, RoPE half", "silu(gate) * up, 256", "sequential, RMSNorm")
    ],
    "gpt_neox": [
        (
            "0-1 (2)",
            "4 heads of 32, RoPE half 8, fused qkv, bias qkvo",
            "gelu(up), 256, bias",
            "parallel, LayerNorm",
        )
    ],
    "gemma2": [
        (
            f"{number} (1)",
            f"4/2 heads of 32, RoPE half, soft-cap 50{window}",
            "gelu_tanh(gate) * up, 256",
            "sequential, RMSNorm, 1 + weight, post-norm",
        )
        for number, window in enumerate((", window 8", ""))
    ],
    "deepseek_v3": [
        ("0 (1)", "not recognised", "silu(gate) * up, 256", "sequential, RMSNorm"),
        (
            "1 (1)",
            "not recognised",
            "silu(gate) * up, 64, fused, 4 experts + silu(gate) * up, 64",
            "sequential, RMSNorm",
        ),
    ],
}


@pytest.mark.parametrize("family", ROWS)
def test_layer_rows(family: str) -> None:
    assert layer_rows(structure_of(tiny_model(family))) == ROWS[family]


def test_many_layers_are_counted() -> None:
    one = structure_of(tiny_model("gemma2"))
    many = dataclasses.replace(one, layers=one.layers * 5)
    assert [row[0] for row in layer_rows(many)] == ["0, 2, ..., 8 (5)", "1, 3, ..., 9 (5)"]


def test_stream_line() -> None:
    bloom = stream_line(structure_of(tiny_model("bloom")))
    table = "transformer.word_embeddings"
    assert bloom == f"128 channels from {table} to {table} (tied); 1 norms in the stream itself"
    granite = stream_line(structure_of(tiny_model("granite", embedding_multiplier=12.0)))
    assert granite == "128 channels from model.embed_tokens to lm_head; multiplied by 12"
