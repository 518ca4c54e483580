"""rotate_values: another basis of every value head, the same logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qoqc.passes.folds.rotate_values import rotate_values
from qoqc.passes.folds.tensors import attentions
from qoqc.testing import FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"deepseek_v3"}))
def test_logits_stay(family: str, bench: Any, tolerance: float) -> None:
    b = bench(family)
    result = rotate_values(b.structure, b.tensors)
    assert result.refused == ()
    assert len(result.applied) == 2
    blocks = attentions(b.structure).values()
    expected = {ref.weight for block in blocks for ref in (block.v, block.o)}
    expected |= {block.v.bias for block in blocks if block.v.bias is not None}
    assert b.changed() == expected
    assert b.error() < tolerance


@pytest.mark.parametrize("head_dim", [24, 20])
def test_heads_that_are_no_power_of_two(head_dim: int, bench: Any, tolerance: float) -> None:
    b = bench("llama", head_dim=head_dim, attention_bias=True)
    assert len(rotate_values(b.structure, b.tensors).applied) == 2
    assert b.error() < tolerance


def test_only_the_rows_of_the_values_change(bench: Any) -> None:
    b = bench("gpt_neox")
    rotate_values(b.structure, b.tensors)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    changed = (b.tensors[name] != b.kept[name]).any(1).view(4, 3, 32)  # [heads, q/k/v, channel]
    assert not changed[:, :2].any()
    assert changed[:, 2].all()


def test_an_outlier_channel_is_spread(bench: Any) -> None:
    b = bench("llama")
    name = "model.layers.0.self_attn.v_proj.weight"
    b.tensors[name][7] *= 100
    rotate_values(b.structure, b.tensors)
    rows = b.tensors[name][:32].norm(dim=1)
    assert float(rows.max() / rows.min()) < 1.5  # they share what one of them had


def test_normalized_values_are_refused(bench: Any) -> None:
    b = bench("qwen3")
    layer = b.structure.layers[0]
    block = dataclasses.replace(layer.attention, v_norm=layer.attention.k_norm)
    changed = dataclasses.replace(layer, attention=block)
    structure = dataclasses.replace(b.structure, layers=(changed, b.structure.layers[1]))
    result = rotate_values(structure, b.tensors)
    assert [r.reason for r in result.refused] == ["the values are normalized after v"]
    assert result.applied == ("model.layers.1.self_attn.o_proj.weight",)
    assert torch.equal(b.tensors[block.v.weight], b.kept[block.v.weight])
