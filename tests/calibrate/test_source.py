"""Folding a block at a time gives what folding the whole model gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qoqc.calibrate.names import block_names
from qoqc.calibrate.recipe import Recipe
from qoqc.calibrate.source import Source
from qoqc.passes.folds.norms import norms
from qoqc.passes.folds.rotate import rotate
from qoqc.passes.folds.tensors import tensors_of
from qoqc.passes.structure.discover import structure_of
from qoqc.testing import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma2", "phi", "gpt_neox", "opt", "cohere", "olmo2", "gpt2"]
)
def test_the_parts_are_the_whole(family: str) -> None:
    """Bit for bit, with what is refused and why; the model keeps its own values."""
    model = tiny_model(family, torch.bfloat16)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = structure_of(model)
    whole, structure = tensors_of(model, found, torch.float32)
    refused = [
        str(refusal)
        for result in (norms(structure, whole), rotate(structure, whole, 3))
        for refusal in result.refused
    ]
    names = block_names(model, found)
    source = Source(model, found, names, Recipe(seed=3), CPU)
    parts = [source.block(name) for name in names] + [source.outside()]
    assert source.structure == structure
    assert list(source.refused) == [*(f"not recognised: {x}" for x in found.problems), *refused]
    assert sum(map(len, parts)) == len(whole)
    for part in parts:
        for name, tensor in part.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, whole[name]), name
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())


def test_without_rotation_tensors_are_as_they_are() -> None:
    model = tiny_model("llama", torch.bfloat16)
    found = structure_of(model)
    source = Source(model, found, block_names(model, found), Recipe(rotate=False), CPU)
    for name, tensor in source.block("model.layers.1").items():
        assert torch.equal(tensor, model.get_parameter(name).float())


def test_embeddings_come_without_the_head_behind_them() -> None:
    """The head of a large model is gigabytes that embedding does not need."""
    model = tiny_model("llama")
    found = structure_of(model)
    source = Source(model, found, block_names(model, found), Recipe(), CPU)
    assert set(source.outside(head=False)) == {"model.embed_tokens.weight"}
    assert set(source.outside()) == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    }  # fmt: skip


def test_a_norm_that_another_block_reads_is_refused() -> None:
    model = tiny_model("llama")
    found = structure_of(model)
    first, second = (c.norm for c in found.stream.consumers[:3:2])
    assert first is not None
    assert second is not None
    swapped = tuple(
        dataclasses.replace(c, norm={first: second, second: first}.get(c.norm, c.norm))
        if c.norm is not None
        else c
        for c in found.stream.consumers
    )
    odd = dataclasses.replace(found, stream=dataclasses.replace(found.stream, consumers=swapped))
    source = Source(model, odd, block_names(model, found), Recipe(), CPU)
    assert f"{first.weight}: what reads it is in another block" in source.refused
    assert f"residual stream: {second.weight} is not folded" in source.refused
    part = source.block("model.layers.0")
    for name in (first.weight, "model.layers.0.self_attn.q_proj.weight"):
        assert name is not None
        assert torch.equal(part[name], model.get_parameter(name))
