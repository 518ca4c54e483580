"""A packed module is the linear it stands for: in eager, under any backend, after it moved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qoqc.errors import StaleWeights
from qoqc.passes.linear import linear as linear_pass
from qoqc.passes.normalize import normalize
from qoqc.quant.weight import dequantize_weight, quantize_weight
from qoqc.runtime.packed_linear import (
    PackedLinear,
    named_tensors,
    replaceable,
    stored_linear,
)
from qoqc.runtime.weights import STORE, GroupSize
from qoqc.testing import capture, context, run_graph, sqnr, targets

N, K = 192, 320


def linear(kind: Any = nn.Linear, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    made = Conv1D(N, K) if kind is Conv1D else nn.Linear(K, N)
    with torch.no_grad():
        made.bias.normal_()
    return made.to(dtype).requires_grad_(False)


def packed(like: Any, group_size: GroupSize = 128) -> PackedLinear:
    weight = like.weight.t() if isinstance(like, Conv1D) else like.weight
    module = PackedLinear(like, {})
    module.seal("module.weight", quantize_weight(weight, group_size))
    return module


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_computes_the_quantized_linear(
    kind: type[nn.Module], group_size: GroupSize, dtype: torch.dtype
) -> None:
    like = linear(kind, dtype)
    module = packed(like, group_size)
    x = torch.randn(2, 5, K, dtype=dtype)
    y = module(x)
    assert (y.shape, y.dtype) == ((2, 5, N), dtype)
    current = STORE.current(module.weight)
    expected = x.float() @ dequantize_weight(current).t() + like.bias.float()
    # int8 activations: absmax/127 steps, 40 dB on normal values (6 dB a bit, less the crest factor)
    assert sqnr(expected, y) > 35
    assert not torch.equal(expected.to(dtype), y), "activations were not quantized"


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "qoq"])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_every_backend_gives_what_eager_gives(kind: type[nn.Module], backend: str) -> None:
    module = packed(linear(kind))
    x = torch.randn(3, 5, K, dtype=torch.bfloat16)
    torch._dynamo.reset()
    options: dict[str, Any] = {"options": {"glue": "eager"}} if backend == "qoq" else {}
    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend=backend, **options)(x), module(x))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_passes_see_the_linear(kind: type[nn.Module]) -> None:
    module = packed(linear(kind))
    x = torch.randn(4, K, dtype=torch.bfloat16)
    gm, inputs = capture(module, x)
    assert targets(gm)["stored_linear"] == 1
    ctx = context(gm, inputs)
    ctx.store = STORE
    assert normalize(gm, ctx) == 1
    assert linear_pass(gm, ctx) == 1
    assert targets(gm)["w4a8_linear"] == 1
    assert "stored_linear" not in targets(gm)
    assert torch.equal(run_graph(gm, ctx)[0], module(x))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_fake_and_real_agree(kind: type[nn.Module]) -> None:
    # not by opcheck, which copies the arguments: the op knows its weight by identity
    module = packed(linear(kind))
    x = torch.randn(2, 3, K, dtype=torch.bfloat16)
    real = stored_linear(x, module.weight, module.bias, module.transposed)
    fake = stored_linear(x.to("meta"), module.weight.to("meta"), None, module.transposed)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_its_state_dict_has_the_packed_tensors() -> None:
    like = linear()
    module = packed(like)
    state = module.state_dict()
    assert set(state) == {"bias", "qweight", "channel_scale", "group_word"}
    for field, tensor in quantize_weight(like.weight, 128).tensors().items():
        assert torch.equal(state[field], tensor), field
    assert dict(module.named_buffers()) == {}, "STORE has them, a second time would cost memory"


def test_an_open_module_is_filled_by_name() -> None:
    like = linear()
    stored = quantize_weight(like.weight, 128).tensors()
    module = PackedLinear(like, {name: (tuple(t.shape), t.dtype) for name, t in stored.items()})
    assert set(module.state_dict()) == {"bias", *stored}
    assert all(tensor.is_meta for name, tensor in module.state_dict().items() if name != "bias")
    for name, tensor in stored.items():
        setattr(module, name, tensor)
    module.seal("module.weight")
    x = torch.randn(2, K, dtype=torch.bfloat16)
    assert torch.equal(module(x), packed(like)(x))


def test_it_has_no_16_bit_storage() -> None:
    module = packed(linear())
    assert module.weight.shape == (N, K)
    assert module.weight.isnan().all()
    assert STORE.is_released(module.weight)


def test_it_can_be_cast_and_moved() -> None:
    module = packed(linear())
    x = torch.randn(2, K)
    before = module(x.bfloat16())
    module.to(torch.float32)
    assert module.weight.dtype == module(x).dtype == torch.float32
    assert STORE.current(module.weight).channel_scale.dtype == torch.float32
    module.to(torch.float16)
    assert STORE.current(module.weight).channel_scale.dtype == torch.float32, "scales stay exact"
    module.to(torch.bfloat16)
    assert torch.equal(module(x.bfloat16()), before)
    weight = module.weight
    assert module.to("cpu").weight is weight, "nothing moved, nothing made anew"
    module.to("meta")
    assert module.weight.is_meta
    assert STORE.current(module.weight).qweight.is_meta


@pytest.mark.parametrize("change", ["write", "replace", "copy"])
def test_a_changed_weight_is_an_error(change: str) -> None:
    module = packed(linear())
    if change == "write":
        module.weight.zero_()
    elif change == "replace":
        module.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.bfloat16), requires_grad=False)
    else:
        module = copy.deepcopy(module)
    with pytest.raises(StaleWeights, match=r"\[192, 320\] was replaced, copied or written"):
        module(torch.randn(2, K, dtype=torch.bfloat16))
    # released weights share what they read as
    assert packed(linear()).weight.isnan().all()


def test_what_it_may_stand_for() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Named(nn.Linear):
        pass

    assert replaceable(nn.Linear(2, 2))
    assert replaceable(Named(2, 2))
    assert replaceable(Conv1D(2, 2))
    assert not replaceable(Scaled(2, 2))
    assert not replaceable(nn.Embedding(2, 2))


def test_named_tensors_are_parameters_and_saved_buffers() -> None:
    model = nn.Sequential(packed(linear()), nn.BatchNorm1d(4))
    model[1].register_buffer("scratch", torch.zeros(1), persistent=False)
    model.again = model[0]
    names = [name for name, _ in named_tensors(model)]
    assert {"0.weight", "0.bias", "again.weight", "1.running_mean"} <= set(names)
    assert "1.scratch" not in names
