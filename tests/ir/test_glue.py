"""The definitions of the fused glue against the modules of transformers and torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qoqc.ir import glue
from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.quant.activation import quantize_act


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MODULES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # kind, eps, offset, round_first
    "llama": (LlamaRMSNorm, ("rms", 1e-5, 0.0, True)),
    "gemma": (GemmaRMSNorm, ("rms", 1e-5, 1.0, False)),
    "olmo2": (Olmo2RMSNorm, ("rms", 1e-5, 0.0, False)),
    "torch": (torch.nn.RMSNorm, ("rms", 1e-5, 0.0, False)),
    "cohere": (CohereLayerNorm, ("centred", 1e-5, 0.0, False)),
    "layer": (torch.nn.LayerNorm, ("layer", 1e-5, 0.0, False)),
}


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES)
@pytest.mark.parametrize("name", MODULES)
def test_norms_of_models(name: str, dtype: torch.dtype) -> None:
    make, arguments = MODULES[name]
    module = make(200, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(randn(200, seed=1))
    x = (randn(3, 5, 200) * 3).to(dtype)
    with torch.no_grad():
        bias = getattr(module, "bias", None)
        assert torch.equal(glue.norm(x, module.weight, bias, *arguments), module(x))


def test_the_forms_differ_where_they_round() -> None:
    """Each argument matters in 16 bit: none of the equalities above is empty."""
    x, weight = randn(8, 200).bfloat16() * 3, randn(200, seed=1).bfloat16()
    forms = [("rms", 0.0, True), ("rms", 0.0, False), ("rms", 1.0, False), ("centred", 0.0, False)]
    results = [glue.norm(x, weight, None, kind, 1e-5, *rest) for kind, *rest in forms]
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert not torch.equal(a, b)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_norm_quant_is_the_chain(residual: bool, keep: bool) -> None:
    x, r = randn(2, 3, 64).bfloat16(), randn(2, 3, 64, seed=1).bfloat16()
    weight = randn(64, seed=2).bfloat16()
    total = x + r if residual else x
    normed = glue.norm(total, weight, None, "rms", 1e-6, 0.0, True)
    xq, scale, count, new_residual, kept = glue.norm_quant(
        x, r if residual else None, weight, None, "rms", 1e-6, 0.0, True, keep
    )
    for got, want in zip((xq, scale, count), quantize_act(normed), strict=True):
        assert torch.equal(got, want)
    empty = torch.empty(0, dtype=torch.bfloat16)
    assert torch.equal(new_residual, total if residual else empty)
    assert torch.equal(kept, normed if keep else empty)


@pytest.mark.parametrize("kind", get_args(glue.ActKind))
def test_act_quant_rounds_between_its_ops(kind: str) -> None:
    gate, up = randn(4, 64).bfloat16() * 3, randn(4, 64, seed=1).bfloat16()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": torch.nn.GELU("tanh"),
        "relu": F.relu,
    }
    act = functions[kind](gate)
    for other, value in ((up, act * up), (None, act)):
        for got, want in zip(glue.act_quant(gate, other, kind), quantize_act(value), strict=True):
            assert torch.equal(got, want)
