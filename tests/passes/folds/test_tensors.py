"""Tensors leave the model and come back; a tied head comes back on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qoqc.errors import Unsupported
from qoqc.passes.folds.norms import norms
from qoqc.passes.folds.rotate import rotate
from qoqc.passes.folds.tensors import tensors_of, write_back
from qoqc.passes.structure.discover import structure_of
from qoqc.testing import tiny_model


def test_copies(bench: Any) -> None:
    model = tiny_model("llama", torch.bfloat16)
    tensors, structure = tensors_of(model, structure_of(model), torch.float32)
    parameters = dict(model.named_parameters())
    assert tensors.keys() == parameters.keys()
    assert structure.stream.head is not None
    assert structure.stream.head.weight == "lm_head.weight"
    tensors["lm_head.weight"].zero_()
    assert parameters["lm_head.weight"].any()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_write_back_keeps_dtypes_and_parameters() -> None:
    model = tiny_model("llama", torch.bfloat16)
    tensors, _ = tensors_of(model, structure_of(model))
    before = dict(model.named_parameters())
    tensors["model.norm.weight"].mul_(3)
    expected = tensors["model.norm.weight"].to(torch.bfloat16)
    write_back(model, tensors)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(after["model.norm.weight"], expected)


@pytest.mark.parametrize("family", ["gemma", "gpt2", "opt"])
def test_a_tied_head_is_untied_for_good(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    structure = structure_of(model)
    assert structure.stream.tied
    tensors, untied = tensors_of(model, structure)
    assert untied.stream.head is not None
    assert not untied.stream.tied
    assert untied.stream.head.weight == "lm_head.weight"
    norms(untied, tensors)
    assert rotate(untied, tensors).refused == ()
    write_back(model, tensors)
    tokens = torch.arange(8)[None]
    expected = model(input_ids=tokens).logits
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.config.tie_word_embeddings
    torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)
    # and the structure of what was written is one without a tie
    assert not structure_of(loaded).stream.tied


def test_an_unknown_tensor_is_an_error() -> None:
    model = tiny_model("llama")
    with pytest.raises(Unsupported, match="nothing.weight is no parameter of LlamaForCausalLM"):
        write_back(model, {"nothing.weight": torch.ones(1)})
