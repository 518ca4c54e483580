"""Layers of the plug-in on artifacts, against a stub of vLLM (conftest.py)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qoqc.errors import ArtifactError, Unsupported
from tests.vllm_plugin.loading import ATTENTION, MAPPING, MLP, activations, config_of, fill, saved


@pytest.fixture(scope="module", params=[128, -1], ids=["g128", "per-channel"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with k and v of 64 rows, half a tile, and biases."""
    directory = tmp_path_factory.mktemp("vllm") / "qwen2"
    return saved(directory, "qwen2", group_size=request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("vllm") / "llama")


def test_merged_and_plain_layers_compute_what_the_artifact_does(
    vllm: SimpleNamespace, artifact: Path
) -> None:
    config = config_of(vllm, artifact, MAPPING)
    model = AutoModelForCausalLM.from_pretrained(artifact)
    layers = {
        f"{ATTENTION}.qkv_proj": (128, [128, 64, 64], MAPPING["qkv_proj"]),
        f"{ATTENTION}.o_proj": (128, [128], ["o_proj"]),
        f"{MLP}.gate_up_proj": (128, [256, 256], MAPPING["gate_up_proj"]),
        f"{MLP}.down_proj": (256, [128], ["down_proj"]),
    }
    for prefix, (columns, rows, children) in layers.items():
        layer = vllm.LinearBase(config, prefix, columns, rows)
        above = prefix.rpartition(".")[0]
        fill(layer, artifact, above, children)
        own = [model.get_submodule(f"{above}.{child}") for child in children]
        for dtype in config.get_supported_act_dtypes():
            x = activations(columns, dtype)
            bias = layer.bias
            if bias is not None:
                layer.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)
            with torch.no_grad():
                expected = torch.cat([linear.to(dtype)(x) for linear in own], dim=-1)
                found = layer(x)
            assert found.dtype == dtype and found.shape == (2, 5, sum(rows))
            assert torch.equal(found, expected), prefix
            layer.bias = bias


def test_parameters_have_the_shapes_of_the_stored_tensors(
    vllm: SimpleNamespace, artifact: Path
) -> None:
    config = config_of(vllm, artifact, MAPPING)
    grouped = json.loads((artifact / "config.json").read_text())["quantization_config"]
    layer = vllm.LinearBase(config, f"{ATTENTION}.qkv_proj", 128, [128, 64, 64])
    found = {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}
    grid: dict[str, Any] = {"group_word": ((1, 256), torch.int32)}
    if grouped["group_size"] == -1:
        grid = {"channel_zero": ((256,), torch.int32)}
    assert found == {
        "qweight": ((3, 1, 128, 64), torch.uint8),  # k and v begin at tiles of their own
        "channel_scale": ((256,), torch.float32),
        **grid,
    }
    fill(layer, artifact, ATTENTION, MAPPING["qkv_proj"])
    assert tuple(layer.qweight.shape) == (2, 1, 128, 64)  # and now they share one
    assert all(type(p) is torch.nn.Parameter for p in layer.parameters())


def test_it_compiles_without_a_graph_break(vllm: SimpleNamespace, llama: Path) -> None:
    config = config_of(vllm, llama, MAPPING)
    layer = vllm.LinearBase(config, f"{MLP}.gate_up_proj", 128, [256, 256])
    fill(layer, llama, MLP, MAPPING["gate_up_proj"])
    x = activations(128)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled: Any = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_a_weight_made_one_before_it_was_saved_is_loaded_as_one(
    vllm: SimpleNamespace, tmp_path: Path
) -> None:
    directory = saved(tmp_path / "phi3", "phi3")
    prefix = f"{ATTENTION}.qkv_proj"
    config = config_of(vllm, directory, {"qkv_proj": ["qkv_proj"]})
    layer = vllm.LinearBase(config, prefix, 128, [128, 64, 64])
    fill(layer, directory, ATTENTION, ["qkv_proj"])
    linear = AutoModelForCausalLM.from_pretrained(directory).get_submodule(prefix)
    x = activations(128)
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x))
    # whose rows may be in another order in vLLM, which nothing tells
    for mapping in ({}, MAPPING):
        config = config_of(vllm, directory, mapping)
        with pytest.raises(Unsupported, match="does not say in which order"):
            vllm.LinearBase(config, prefix, 128, [128, 64, 64])


def test_a_loader_that_would_reorder_rows_is_stopped(vllm: SimpleNamespace, llama: Path) -> None:
    layer = vllm.LinearBase(config_of(vllm, llama, MAPPING), f"{MLP}.down_proj", 256, [128])
    with pytest.raises(Unsupported, match=r"down_proj: vLLM reorders the weights"):
        getattr(layer.qweight, "output_dim", None)


def test_more_than_one_rank_is_refused(vllm: SimpleNamespace, llama: Path) -> None:
    config = config_of(vllm, llama, MAPPING)
    vllm.ranks = 2
    with pytest.raises(Unsupported, match="tensor_parallel_size=2"):
        vllm.LinearBase(config, f"{MLP}.down_proj", 256, [128])


def test_sizes_and_names_must_be_those_of_the_artifact(vllm: SimpleNamespace, llama: Path) -> None:
    config = config_of(vllm, llama, MAPPING)
    with pytest.raises(ArtifactError, match="describes another model"):
        vllm.LinearBase(config, f"{ATTENTION}.qkv_proj", 128, [128, 128, 64])
    with pytest.raises(ArtifactError, match="describes another model"):
        vllm.LinearBase(config, f"{MLP}.down_proj", 128, [128])
    with pytest.raises(ArtifactError, match=r"has no model\.layers\.7\.mlp\.down_proj\.weight"):
        vllm.LinearBase(config, "model.layers.7.mlp.down_proj", 256, [128])


def test_a_tensor_that_does_not_come_is_noticed(vllm: SimpleNamespace, llama: Path) -> None:
    config = config_of(vllm, llama, MAPPING)
    layer = vllm.LinearBase(config, f"{MLP}.gate_up_proj", 128, [256, 256])
    with safe_open(llama / "model.safetensors", framework="pt") as file:
        for field in ("qweight", "channel_scale", "group_word"):
            layer.load(field, file.get_tensor(f"{MLP}.gate_proj.{field}"), 0)
        layer.load("qweight", file.get_tensor(f"{MLP}.up_proj.qweight"), 1)
    with pytest.raises(ArtifactError, match=r"up_proj\.channel_scale was not loaded"):
        layer.quant_method.process_weights_after_loading(layer)
