"""smooth_attention: keys divided, queries multiplied, the same logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from qoqc.errors import Unsupported
from qoqc.passes.folds.smooth_attention import shared_maximum, smooth_attention
from qoqc.passes.folds.tensors import attentions
from qoqc.testing import FAMILIES

FIRST = "model.layers.0.self_attn.o_proj.weight"
"""The first attention's name in families written like Llama."""


def random_scales(structure: Any, seed: int) -> dict[str, Tensor]:
    """Factors in 0.1..10 for every attention."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: shared_maximum(block, 10 ** (torch.rand(shape, generator=generator) * 2 - 1))
        for name, block in attentions(structure).items()
        for shape in [(block.kv_heads, block.head_dim)]
    }


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"deepseek_v3"}))
def test_logits_stay(family: str, seed: int, bench: Any, tolerance: float) -> None:
    b = bench(family)
    result = smooth_attention(b.structure, b.tensors, random_scales(b.structure, seed))
    assert result.refused == ()
    assert len(result.applied) == 2
    expected = set()
    for block in attentions(b.structure).values():
        for ref, norm in ((block.q, block.q_norm), (block.k, block.k_norm)):
            expected |= {ref.weight, ref.bias} if norm is None else {norm.norm.weight}
    assert b.changed() == expected - {None}
    assert b.error() < tolerance


VARIANTS: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True},  # a norm weight of its own for every head
    "phi": {"qk_layernorm": True},  # LayerNorm with a bias on queries and keys
    "llama": {"attention_bias": True, "head_dim": 24},
}


@pytest.mark.parametrize("family", VARIANTS)
def test_variants(family: str, bench: Any, tolerance: float) -> None:
    b = bench(family, **VARIANTS[family])
    result = smooth_attention(b.structure, b.tensors, random_scales(b.structure, 2))
    assert len(result.applied) == 2
    assert b.error() < tolerance


def test_keys_are_divided(bench: Any) -> None:
    b = bench("qwen2")
    (name, scale), *_ = random_scales(b.structure, 0).items()
    smooth_attention(b.structure, b.tensors, {name: scale})
    for part in ("weight", "bias"):
        key = f"model.layers.0.self_attn.k_proj.{part}"
        expected = b.kept[key] / scale.reshape(-1, *[1] * (b.kept[key].dim() - 1))
        torch.testing.assert_close(b.tensors[key], expected)


def test_shared_maximum_pairs_as_rope_does(bench: Any) -> None:
    values = torch.rand(2, 32, dtype=torch.float64)
    half = shared_maximum(attentions(bench("llama").structure)[FIRST], values)
    assert torch.equal(half[:, :16], torch.maximum(values[:, :16], values[:, 16:]))
    assert torch.equal(half[:, :16], half[:, 16:])
    pairs = shared_maximum(attentions(bench("cohere").structure)[FIRST], values).view(2, 16, 2)
    assert torch.equal(pairs[..., 0], values.view(2, 16, 2).amax(-1))
    assert torch.equal(pairs[..., 0], pairs[..., 1])
    (partial, *_) = attentions(bench("phi").structure).values()
    found = shared_maximum(partial, values)
    assert torch.equal(found[:, 16:], values[:, 16:])
    assert torch.equal(found[:, :8], torch.maximum(values[:, :8], values[:, 8:16]))
    shared = shared_maximum(attentions(bench("qwen3").structure)[FIRST], values)
    assert torch.equal(shared[0], shared[1])


@pytest.mark.parametrize("family", ["llama", "cohere", "phi"])
def test_factors_that_rope_would_mix_are_refused(family: str, bench: Any) -> None:
    b = bench(family)
    (name, *_) = attentions(b.structure)
    scale = torch.ones(2, 32)
    scale[1, 3] = 2.0
    (refusal,) = smooth_attention(b.structure, b.tensors, {name: scale}).refused
    assert (refusal.name, refusal.reason) == (
        name,
        "RoPE mixes channels that have different factors",
    )
    assert b.changed() == set()


def test_factors_beyond_rope_are_free(bench: Any, tolerance: float) -> None:
    b = bench("phi")
    (name, *_) = attentions(b.structure)
    scale = torch.ones(2, 32)
    scale[1, 20] = 2.0
    assert smooth_attention(b.structure, b.tensors, {name: scale}).applied == (name,)
    assert b.error() < tolerance


def test_heads_that_share_a_norm_need_the_same_factors(bench: Any) -> None:
    b = bench("gemma3_text")
    scale = torch.ones(2, 32)
    scale[1] = 2.0
    (refusal,) = smooth_attention(b.structure, b.tensors, {FIRST: scale}).refused
    assert refusal.reason == (
        "heads share model.layers.0.self_attn.q_norm.weight and have different factors"
    )
    assert b.changed() == set()


def test_a_norm_without_weights_is_refused(bench: Any) -> None:
    b = bench("qwen3")
    layer = b.structure.layers[0]
    norm = layer.attention.k_norm
    bare = dataclasses.replace(norm, norm=dataclasses.replace(norm.norm, weight=None))
    block = dataclasses.replace(layer.attention, k_norm=bare)
    layers = (dataclasses.replace(layer, attention=block),)
    structure = dataclasses.replace(b.structure, layers=layers)
    (refusal,) = smooth_attention(structure, b.tensors, {FIRST: torch.full((2, 32), 2.0)}).refused
    assert "undoes any factor" in refusal.reason
    assert b.changed() == set()


def test_bad_factors(bench: Any) -> None:
    b = bench("llama")
    with pytest.raises(ValueError, match=r"shape \[2, 16\], expected \[2, 32\]"):
        smooth_attention(b.structure, b.tensors, {FIRST: torch.ones(2, 16)})
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(Unsupported, match=f"{FIRST}: a scale is not positive and finite"):
            smooth_attention(b.structure, b.tensors, {FIRST: torch.full((2, 32), bad)})
    (refusal,) = smooth_attention(b.structure, b.tensors, {"x": torch.ones(2, 32)}).refused
    assert (refusal.name, refusal.reason) == ("x", "no recognised attention ends in it")
    assert b.changed() == set()
