"""The shape of a cache is told without values, and by a real step where that is not enough."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModelForCausalLM

from qoqc.artifact.load import load_model
from qoqc.artifact.save import save
from qoqc.decode.probe import probe_kv
from qoqc.errors import Unsupported
from qoqc.ir.spec import KVSpec
from qoqc.runtime.weights import STORE
from qoqc.testing import tiny_model

LLAMA = [KVSpec(2, 32, 32)] * 2


def watched(model: Any) -> list[bool]:
    """Whether the steps of `model` from now on had values."""
    real: list[bool] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, y: real.append(not isinstance(y, FakeTensor)))
    return real


@pytest.mark.parametrize("inference", [False, True])
def test_nothing_runs(inference: bool) -> None:
    model = tiny_model("llama")
    real = watched(model)
    with torch.inference_mode(inference):
        assert probe_kv(model) == LLAMA
    assert real == [False]
    assert torch.isfinite(model(torch.tensor([[3, 4]])).logits).all()
    assert real == [False, True]


def test_packed_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tiny_model("llama"), tmp_path / "artifact")
    model, _ = load_model(tmp_path / "artifact")

    def current(*_: Any) -> None:
        raise AssertionError("a packed weight was asked for")

    monkeypatch.setattr(STORE, "current", current)
    assert probe_kv(model) == LLAMA


def test_sizes_of_latent_attention() -> None:
    assert probe_kv(tiny_model("deepseek_v3", torch.bfloat16))[0] == KVSpec(1, 64, 32)


def test_a_model_that_asks_for_values_runs(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    real = watched(model)

    def ask(module: Any, args: Any, out: Any) -> None:
        int(out.last_hidden_state.argmax())

    model.model.register_forward_hook(ask)
    with caplog.at_level(logging.INFO, logger="qoqc"):
        assert probe_kv(model) == LLAMA
    assert real == [True]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "LlamaForCausalLM needs values to tell its shapes" in told


def test_errors_of_torch_about_the_first_try_are_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("mixtral")  # in fp32 its experts have no shape function
    real = watched(model)
    assert len(probe_kv(model)) == 2
    assert real == [True]
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_what_modules_keep_has_values() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0]

    def keep(module: Any, args: Any, out: Any) -> None:
        module.last = out
        module.register_buffer("seen", torch.ones(1), persistent=False)

    layer.register_forward_hook(keep)
    probe_kv(model)
    assert not hasattr(layer, "last")
    assert not hasattr(layer, "seen")
    model(torch.tensor([[3, 4]]))
    probe_kv(model)
    assert not isinstance(layer.seen, FakeTensor)


def test_an_error_of_the_model_is_its_own() -> None:
    model = tiny_model("llama")

    def fail(*_: Any) -> None:
        raise ValueError("no such thing")

    model.model.register_forward_hook(fail)
    with pytest.raises(ValueError, match="no such thing"):
        probe_kv(model)


def test_a_layer_without_keys() -> None:
    model = tiny_model("llama")
    # a layer that does not write to the cache
    first = model.model.layers[0]
    first.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(Unsupported, match="layer 0 keeps no keys and values; compile with kv_b"):
        probe_kv(model)


def test_a_layer_with_another_state() -> None:
    """Falcon-H1's layers are attention and a state space side by side."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_ssm": 64}
    more = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    config = AutoConfig.for_model("falcon_h1", **sizes, **heads, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(Unsupported, match="layer 0 keeps a state besides keys and values"):
        probe_kv(model)
