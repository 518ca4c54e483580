"""Many models in one process: no graph of a later one is worse than it would be alone.

Dynamo takes every int, float and size in which two models differ for a variable of the graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import qoqc
from qoqc.passes import manager
from qoqc.passes.context import Context
from qoqc.testing import VOCAB, targets, tiny_model

DIFFERENT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"kv_bits": 8}),
    ({}, {"group_size": -1}),
    ({"rms_norm_eps": 3e-5}, {}),
    ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}, {}),
    ({"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8}, {}),
]
"""Changes to the model's config, and options to compile it with."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_each_model_gets_the_graphs_it_gets_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    found: list[dict[str, int]] = []
    real = manager.run

    def run(gm: GraphModule, ctx: Context, name: str) -> None:
        real(gm, ctx, name)
        found.append({k: n for k, n in targets(gm).items() if hasattr(torch.ops.qoqc, k)})

    monkeypatch.setattr(manager, "run", run)
    first: list[dict[str, int]] | None = None
    for changes, options in DIFFERENT:
        model = qoqc.compile(tiny_model(family, **changes), glue="eager", **options)
        # two sizes of batch and cache: the second makes them variables, as they should be
        for batch, prompt in [(1, 12), (2, 300)]:
            ids = torch.randint(3, VOCAB, (batch, prompt))
            model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        if first is None:
            first = found.copy()
            assert any("kv4_decode" in name for graph in first for name in graph)
            assert any("norm_quant" in name for graph in first for name in graph)
        assert found == first, (changes, options)
        found.clear()
