"""Blocks run one at a time compute what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qoqc.calibrate.blocks import Blocks, rounded_act
from qoqc.calibrate.names import block_names, layers_by_block, structure_for
from qoqc.errors import Unsupported
from qoqc.passes.structure.discover import structure_of
from qoqc.quant.activation import quantize_act
from qoqc.testing import VOCAB, tiny_model

WINDOWS = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(3))
NAMES = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gemma2": "model.layers",
    "gemma3_text": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "falcon": "transformer.h",
    "phi3": "model.layers",
    "olmo2": "model.layers",
    "mixtral": "model.layers",
}


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().float() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", list(NAMES))
def test_the_chain_is_the_model(family: str) -> None:
    """The last block's output equals what the model hands to its final norm."""
    model = tiny_model(family)
    names = [f"{NAMES[family]}.{i}" for i in range(2)]
    blocks, tensors = Blocks(model, names, WINDOWS), parameters(model)
    seen: list[Tensor] = []
    hook = model.get_submodule(names[1]).register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window[None], use_cache=False)
    hook.remove()
    hidden = blocks.embed(tensors, WINDOWS)
    for index in range(2):
        hidden = [blocks.run(index, tensors, x) for x in hidden]
    for got, expected in zip(hidden, seen, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "mixtral"])
def test_the_names_of_the_blocks_come_from_the_structure(family: str) -> None:
    torch._dynamo.reset()
    model = tiny_model(family)
    structure = structure_of(model)
    names = block_names(model, structure)
    assert names == [f"{NAMES[family]}.{i}" for i in range(2)]
    layers = layers_by_block(names, structure)
    assert all(layer is not None and layer.attention is not None for layer in layers)
    alone = structure_for(structure, layers[1])
    assert alone.layers == (layers[1],)
    assert structure_for(structure, None).layers == ()


def test_linears_in_the_order_of_their_calls() -> None:
    model = tiny_model("llama")
    blocks = Blocks(model, [f"model.layers.{i}" for i in range(2)], WINDOWS)
    hidden = blocks.embed(parameters(model), WINDOWS)
    names = [n for n, _ in model.named_parameters() if "layers.1." in n and "proj" in n]
    stages = blocks.call_order(1, sorted(names), parameters(model), hidden[0])
    short = [sorted(name.split(".")[-2] for name in stage) for stage in stages]
    assert short == [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_watching_shows_and_replaces_inputs() -> None:
    model = tiny_model("llama")
    blocks = Blocks(model, [f"model.layers.{i}" for i in range(2)], WINDOWS)
    tensors = parameters(model)
    (x,) = blocks.embed(tensors, WINDOWS[:1])
    plain = blocks.run(0, tensors, x)
    name = "model.layers.0.mlp.down_proj.weight"
    with blocks.watching({name: torch.zeros_like}):
        without_mlp = blocks.run(0, tensors, x)
    assert not torch.equal(without_mlp, plain)
    assert torch.equal(blocks.run(0, tensors, x), plain), "nothing stays behind"
    tensors[name] = torch.zeros_like(tensors[name])
    torch.testing.assert_close(blocks.run(0, tensors, x), without_mlp)


def test_rounding_of_activations_is_that_of_the_kernels() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    xq, scale, _ = quantize_act(x)
    assert torch.equal(rounded_act(x), xq.float() * scale[:, None])


def test_what_is_no_chain_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 0, *args[1:]))
    with pytest.raises(Unsupported, match="not read what model.layers.0 returns"):
        Blocks(model, ["model.layers.0", "model.layers.1"], WINDOWS)


def test_a_block_called_twice_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(Unsupported, match="2 blocks from .* are not called once each"):
        Blocks(model, ["model.layers.0", "model.layers.1"], WINDOWS)


def test_a_block_that_sees_the_text_is_refused() -> None:
    """What it is given beside its input must not depend on the window."""
    model = tiny_model("llama")
    count = iter(range(100))

    def other(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "extra": torch.tensor(next(count))}

    model.model.layers[1].register_forward_pre_hook(other, with_kwargs=True)
    with pytest.raises(Unsupported, match="model.layers.1 is given tensors that depend on the"):
        Blocks(model, ["model.layers.0", "model.layers.1"], WINDOWS)
