"""What a decode step launches per layer, counted from its graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qoqc.artifact.kernel_sources import NOMINAL, Wanted, choices
from qoqc.artifact.launches import LayerLaunches, summary
from qoqc.artifact.survey import Survey, survey
from qoqc.codegen.build import OPS
from qoqc.codegen.family import single
from qoqc.codegen.kernels import few_call
from qoqc.codegen.kernels.quantize import QUANTIZE
from qoqc.config import Options
from qoqc.testing import tiny_model

STEP = ("step_attend", "step_combine")
QKV = "(q_proj k_proj v_proj)"
GATED = (
    f"few_linear {QKV}",
    *STEP,
    "few_linear (o_proj)",
    "few_linear (gate_proj up_proj)",
    "few_linear (down_proj)",
)
GELU = (*GATED[:-1], "act_quantize", "w4a8_linear (down_proj)")
APART = (
    "norm_quantize",
    f"w4a8_linear {QKV}",
    *STEP,
    "quantize",
    "w4a8_linear (o_proj)",
    "norm_quantize",
    "w4a8_linear (gate_proj up_proj)",
    "quantize",
    "w4a8_linear (down_proj)",
)


def of(family: str) -> Survey:
    return survey(tiny_model(family, torch.bfloat16), Options())


@pytest.mark.parametrize(("family", "kernels"), [("llama", GATED), ("qwen3", GATED)])
def test_a_layer_takes_at_most_seven_launches(family: str, kernels: tuple[str, ...]) -> None:
    found = of(family)
    assert [each.layer for each in found.launches] == ["model.layers.0", "model.layers.1"]
    for each in found.launches:
        assert each == LayerLaunches(each.layer, kernels, 0)
        assert len(each.kernels) <= 7


def test_what_is_not_fused_is_counted() -> None:
    """Gemma's GELU is quantized by a kernel of its own; biases of siblings are joined by torch."""
    assert {each.kernels for each in of("gemma").launches} == {GELU}
    assert {(each.kernels, each.torch) for each in of("qwen2").launches} == {(GATED, 1)}


def test_where_no_kernel_takes_few_tokens_a_layer_has_eleven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing = dataclasses.replace(QUANTIZE, name="refusing", refuses=lambda spec, key: "not here")
    monkeypatch.setitem(OPS, few_call.OP, single(refusing))
    found = of("llama")
    assert {each.kernels for each in found.launches} == {APART}
    few = [kernel for kernel in found.kernels if kernel.op == few_call.OP]
    assert few
    assert choices(few, NOMINAL) == []


def test_a_model_wants_the_kernel_of_few_tokens_and_the_two_it_stands_for() -> None:
    kernels = of("llama").kernels
    linears = {kernel.spec for kernel in kernels if kernel.op == "w4a8_linear"}
    norms = {kernel.spec for kernel in kernels if kernel.op == "norm_quantize"}
    few = [kernel.spec for kernel in kernels if kernel.op == few_call.OP]
    assert {spec.linear for spec in few} == linears
    assert {spec.norm for spec in few} == norms | {None}
    found = choices([Wanted(few_call.OP, few[0])], NOMINAL[-1:])
    assert {choice.size for choice in found} == {1}


def test_like_layers_are_one_line() -> None:
    layers = [LayerLaunches(f"h.{i}", ("a", "b"), 0) for i in range(3)]
    layers.append(LayerLaunches("h.3", ("a", "b"), 2))
    assert summary(layers) == [
        "h.0 to h.2: 2 launches: a, b",
        "h.3: 2 launches, and 2 operations of torch's: a, b",
    ]
