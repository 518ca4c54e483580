"""smooth_output: inputs of o and down divided, their columns multiplied, the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qoqc.errors import Unsupported
from qoqc.passes.folds.smooth_output import mlp_refusal, smooth_output
from qoqc.passes.folds.tensors import attentions, mlps
from qoqc.testing import FAMILIES

NOT_HOMOGENEOUS = {"phi", "falcon", "gpt_neox", "gpt2", "starcoder2", "bloom", "mpt"}
"""Families with one linear in front of an activation that is neither relu nor relu squared."""

DOWN = "model.layers.0.mlp.down_proj.weight"


def random_scales(structure: Any, seed: int) -> dict[str, Tensor]:
    """Factors in 0.1..10 for the inputs of every o and down."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        name: (block.kv_heads, block.value_dim) for name, block in attentions(structure).items()
    }
    for name, mlp in mlps(structure).items():
        experts = (mlp.down.experts,) if mlp.down.experts else ()
        shapes[name] = (*experts, mlp.down.in_features)
    return {n: 10 ** (torch.rand(s, generator=generator) * 2 - 1) for n, s in shapes.items()}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str, seed: int, bench: Any, tolerance: float) -> None:
    b = bench(family)
    scales = random_scales(b.structure, seed)
    result = smooth_output(b.structure, b.tensors, scales)
    refused = set(mlps(b.structure)) if family in NOT_HOMOGENEOUS else set()
    assert {refusal.name for refusal in result.refused} == refused
    assert set(result.applied) == scales.keys() - refused
    assert scales.keys() - refused <= b.changed()
    assert not refused & b.changed()
    assert b.error() < tolerance


def test_relu_squared_takes_the_root(bench: Any, tolerance: float) -> None:
    b = bench("opt", activation_function="relu2")
    assert {mlp.activation for mlp in mlps(b.structure).values()} == {"relu2"}
    result = smooth_output(b.structure, b.tensors, random_scales(b.structure, 3))
    assert len(result.applied) == 4
    assert b.error() < tolerance
    name = "model.decoder.layers.0.fc1.bias"
    expected = (
        b.kept[name] / random_scales(b.structure, 3)["model.decoder.layers.0.fc2.weight"].sqrt()
    )
    torch.testing.assert_close(b.tensors[name], expected)


def test_gated_biases(bench: Any, tolerance: float) -> None:
    b = bench("granite", mlp_bias=True, attention_bias=True)
    assert len(smooth_output(b.structure, b.tensors, random_scales(b.structure, 4)).applied) == 4
    assert "model.layers.0.mlp.up_proj.bias" in b.changed()
    assert "model.layers.0.mlp.gate_proj.bias" not in b.changed()
    assert b.error() < tolerance


def test_experts_may_share_factors(bench: Any, tolerance: float) -> None:
    b = bench("mixtral")
    (name, *_) = mlps(b.structure)
    scale = torch.rand(256, generator=torch.Generator().manual_seed(0)) + 0.5
    assert smooth_output(b.structure, b.tensors, {name: scale}).applied == (name,)
    assert b.error() < tolerance


def test_reasons(bench: Any) -> None:
    b = bench("gpt_neox")
    (mlp, *_) = mlps(b.structure).values()
    assert mlp_refusal(mlp) == "gelu does not pass a factor on, and there is no gate"
    (llama, *_) = mlps(bench("llama").structure).values()
    assert mlp_refusal(llama) is None
    (refusal,) = smooth_output(b.structure, b.tensors, {"x": torch.ones(4)}).refused
    assert (refusal.name, refusal.reason) == ("x", "no recognised attention or MLP ends in it")


def test_bad_factors(bench: Any) -> None:
    b = bench("llama")
    with pytest.raises(ValueError, match=r"shape \[128\], expected \[256\]"):
        smooth_output(b.structure, b.tensors, {DOWN: torch.ones(128)})
    with pytest.raises(Unsupported, match=f"{DOWN}: a scale is not positive and finite"):
        smooth_output(b.structure, b.tensors, {DOWN: torch.full((256,), torch.nan)})
    assert b.changed() == set()
