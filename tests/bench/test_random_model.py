"""Models of random weights: the packed one runs, and its linears never were in 16 bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qoqc
from qoqc.bench.random_model import dense_model, packed_model, random_packed
from qoqc.codegen.tuning.shapes import MODELS
from qoqc.errors import OptionError
from qoqc.quant.weight import expand_int8
from qoqc.runtime.weights import STORE
from qoqc.shapes import SHAPES, linears, shape

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}


def small(name: str) -> dict[str, Any]:
    """A model of this kind and of few parameters."""
    sizes = {**shape(name), **SMALL}
    return {**sizes, "head_dim": 32} if "head_dim" in sizes else sizes


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("name", SHAPES)
def test_packed_model_generates(name: str, group_size: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = packed_model(small(name), CPU, group_size)
    assert STORE.is_released(model.model.layers[0].mlp.up_proj.weight)
    qoqc.compile(model, group_size=group_size, glue="eager")
    out = model.generate(
        torch.arange(3, 9)[None], max_new_tokens=3, output_logits=True,
        return_dict_in_generate=True, eos_token_id=None, do_sample=False,
    )  # fmt: skip
    logits = torch.stack(out.logits)
    assert logits.isfinite().all()
    assert 0.2 < float(logits.float().std()) < 5


def test_no_16bit_linear_is_ever_allocated() -> None:
    """Beside the NaN buffer, of the largest weight, no tensor has a linear's size in bf16."""
    model = packed_model(small("llama-3-8b"), CPU)
    head = model.get_output_embeddings()
    storages = {
        m.weight.untyped_storage().data_ptr()
        for m in model.modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    }
    assert len(storages) == 1
    assert head.weight.dtype == torch.bfloat16
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_dense_model_is_of_the_same_shape() -> None:
    sizes = small("qwen2.5-72b")
    dense, packed = dense_model(sizes, CPU), packed_model(sizes, CPU)
    names = {name: tensor.shape for name, tensor in dense.named_parameters()}
    assert names == {name: tensor.shape for name, tensor in packed.named_parameters()}
    assert dense.dtype == packed.dtype == torch.bfloat16


@pytest.mark.parametrize("group_size", [128, -1])
def test_random_codes_are_legal_and_of_unit_size(group_size: Any) -> None:
    packed = random_packed(200, 384, CPU, group_size)
    if packed.group_word is not None:
        scale, rest = packed.group_word & 255, packed.group_word >> 8
        assert ((128 - rest) == 8 * scale).all()
        assert (8 * scale <= 128).all() and (7 * scale <= 127).all()
    w8 = expand_int8(packed)
    values = w8.float() * packed.channel_scale[:, None]
    assert 0.8 < float(values.std()) * 384**0.5 < 1.2


def test_shapes_are_those_of_the_gemm_benchmark() -> None:
    assert linears(shape("llama-3-8b")) == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert MODELS["qwen2.5-72b"]["qkv"] == (10240, 8192)
    assert MODELS["llama-2-7b"]["qkv"] == (12288, 4096)
    with pytest.raises(OptionError, match="shape 'gpt-5': expected one of llama-3-8b"):
        shape("gpt-5")


@pytest.mark.gpu
def test_on_a_gpu_named_without_its_number() -> None:
    """Parameters on "cuda:0" are where "cuda" is: none is moved, and lost to STORE."""
    torch._dynamo.reset()
    model = packed_model(small("llama-3-8b"), torch.device("cuda"))
    qoqc.compile(model, glue="eager", release=True)
    ids = torch.arange(3, 9, device="cuda")[None]
    assert model.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (1, 9)
