"""rotate: another basis of the residual stream, the same logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qoqc.passes.folds.norms import norms
from qoqc.passes.folds.rotate import rotate
from qoqc.testing import FAMILIES

POST_NORM = {"olmo2", "gemma2", "gemma3_text"}


@pytest.mark.parametrize("seed", [0, 7, None])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - POST_NORM - {"bloom"}))
def test_logits_stay(family: str, seed: int | None, bench: Any, tolerance: float) -> None:
    b = bench(family)
    norms(b.structure, b.tensors)
    b.kept = {name: tensor.clone() for name, tensor in b.tensors.items()}
    result = rotate(b.structure, b.tensors, seed)
    assert result.refused == ()
    stream = b.structure.stream
    rotated = {ref.weight for c in stream.consumers for ref in c.linears}
    rotated |= {p.linear.weight for p in stream.producers} | {
        *stream.embeddings,
        stream.head.weight,
    }
    assert rotated <= b.changed()
    assert b.error() < tolerance


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "cohere"])
@pytest.mark.parametrize("size", [96, 120, 36])
def test_sizes_that_are_no_power_of_two(
    family: str, size: int, bench: Any, tolerance: float
) -> None:
    changes = {"hidden_size": size, "num_attention_heads": 3, "num_key_value_heads": 3}
    b = bench(family, **changes)
    norms(b.structure, b.tensors)
    assert rotate(b.structure, b.tensors).refused == ()
    assert b.error() < tolerance


def test_an_outlier_is_spread(bench: Any) -> None:
    b = bench("llama")
    table = b.tensors["model.embed_tokens.weight"]
    table[:, 5] *= 100
    before = table.abs().amax() / table.square().mean().sqrt()
    norms(b.structure, b.tensors)
    rotate(b.structure, b.tensors)
    after = table.abs().amax() / table.square().mean().sqrt()
    # one channel of 128 holds the norm: its peak over rms is at least sqrt(128) = 11.3
    assert before > 11.3
    assert after < before / 3


@pytest.mark.parametrize("family", sorted(POST_NORM))
def test_post_norms_are_refused(family: str, bench: Any) -> None:
    b = bench(family)
    norms(b.structure, b.tensors)
    b.kept = {name: tensor.clone() for name, tensor in b.tensors.items()}
    (refusal,) = rotate(b.structure, b.tensors).refused
    assert refusal.name == "residual stream"
    assert "post_attention_layernorm.weight normalizes what is added to it" in refusal.reason
    assert b.changed() == set()


def test_a_normalized_embedding_is_refused(bench: Any) -> None:
    b = bench("bloom")
    norms(b.structure, b.tensors)
    (refusal,) = rotate(b.structure, b.tensors).refused
    assert refusal.reason == "it goes through transformer.word_embeddings_layernorm.weight"


def test_unfolded_norms_are_refused(bench: Any) -> None:
    b = bench("gemma")
    (refusal,) = rotate(b.structure, b.tensors).refused
    assert refusal.reason == "model.layers.0.input_layernorm.weight is not folded"
    assert b.changed() == set()


def test_a_tied_head_is_refused(bench: Any) -> None:
    b = bench("gemma")
    norms(b.structure, b.tensors)
    (refusal,) = rotate(b.tied, b.tensors).refused
    assert "tied" in refusal.reason


def test_an_unknown_use_is_refused(bench: Any) -> None:
    b = bench("opt", word_embed_proj_dim=64)  # projections around the stream
    (refusal,) = rotate(b.structure, b.tensors).refused
    assert refusal.reason.startswith("not understood: ")
    stream = dataclasses.replace(b.structure.stream, head=None)
    assert rotate(dataclasses.replace(b.structure, stream=stream), b.tensors).applied == ()
    assert b.changed() == set()


def test_the_same_seed_gives_the_same_tensors(bench: Any) -> None:
    found = []
    for seed in (3, 3, 4):
        b = bench("llama")
        norms(b.structure, b.tensors)
        rotate(b.structure, b.tensors, seed)
        found.append(b.tensors["model.embed_tokens.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
