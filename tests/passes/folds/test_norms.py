"""norms: weights and biases of norms end up in the linears, and the logits stay."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qoqc.passes.folds.norms import gain, norms
from qoqc.testing import FAMILIES


def all_norms(structure: Any) -> list[Any]:
    stream = structure.stream
    return [c.norm for c in stream.consumers if c.norm is not None] + [stream.final_norm]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str, bench: Any, tolerance: float) -> None:
    b = bench(family)
    result = norms(b.structure, b.tensors)
    assert result.refused == ()
    assert set(result.applied) == {norm.weight for norm in all_norms(b.structure)}
    assert set(result.applied) <= b.changed()
    for norm in all_norms(b.structure):
        found = gain(norm, b.tensors)
        assert torch.equal(found, torch.ones_like(found))
    assert b.error() < tolerance


def test_folding_twice_changes_nothing_more(bench: Any) -> None:
    b = bench("gemma")
    norms(b.structure, b.tensors)
    b.kept = {name: tensor.clone() for name, tensor in b.tensors.items()}
    norms(b.structure, b.tensors)
    assert b.changed() == set()


def test_biases_move_where_they_can(bench: Any) -> None:
    b = bench("opt")
    norms(b.structure, b.tensors)
    assert not any(b.tensors[norm.bias].any() for norm in all_norms(b.structure)[:-1])
    # the head has no bias
    last = b.structure.stream.final_norm
    expected = b.kept[last.bias] / b.kept[last.weight]
    torch.testing.assert_close(b.tensors[last.bias], expected)


def test_a_bias_over_a_zero_weight_is_refused(bench: Any, tolerance: float) -> None:
    b = bench("falcon")
    name = "transformer.h.0.input_layernorm.weight"
    b.tensors[name][3] = 0.0
    b.model.get_parameter(name).data[3] = 0.0
    result = norms(b.structure, b.tensors)
    (refusal,) = result.refused
    assert refusal.name == name
    assert "no bias" in refusal.reason
    assert name not in result.applied
    assert b.tensors[name].ne(1).any()


def test_a_tied_head_is_refused(bench: Any, tolerance: float) -> None:
    b = bench("qwen2", tie_word_embeddings=True)
    result = norms(b.tied, b.tensors)
    (refusal,) = result.refused
    assert (refusal.name, "tied" in refusal.reason) == ("model.norm.weight", True)
    assert len(result.applied) == 4


def test_a_norm_in_the_stream_is_refused(bench: Any, tolerance: float) -> None:
    b = bench("opt", do_layer_norm_before=False)
    result = norms(b.structure, b.tensors)
    assert result.applied == ("model.decoder.layers.1.final_layer_norm.weight",)
    assert {r.reason for r in result.refused} == {"its output is the residual stream itself"}
    assert len(result.refused) == 3
    assert b.error() < tolerance


def test_an_unknown_use_refuses_all(bench: Any) -> None:
    b = bench("llama")
    stream = dataclasses.replace(b.structure.stream, problems=("abs (abs) reads the stream",))
    result = norms(dataclasses.replace(b.structure, stream=stream), b.tensors)
    assert result.applied == ()
    assert {r.reason for r in result.refused} == {
        "the residual stream was not understood: abs (abs) reads the stream"
    }
    assert b.changed() == set()
