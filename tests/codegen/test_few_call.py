"""Calls of a linear that quantizes its few tokens itself: checks, outputs, and the tuner's data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qoqc.codegen.family import Launch, Tile
from qoqc.codegen.kernels import norm_call
from qoqc.codegen.kernels.few_call import (
    MAX_TOKENS,
    FewCall,
    FewSpec,
    Outputs,
    call_of,
    takes,
)
from qoqc.codegen.kernels.few_trial import definition, random_call, trial_with
from qoqc.codegen.kernels.norm_call import NormSpec
from qoqc.ir import ops
from qoqc.ir.spec import LinearSpec, to_json
from qoqc.quant.weight import quantize_weight

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16

LINEAR = LinearSpec(200, 96, 128, BF16)
RMS = NormSpec(200, BF16, round_first=True)
SPECS = {
    "alone": FewSpec(LINEAR),
    "bias residual per channel": FewSpec(LinearSpec(200, 96, -1, FP16, True, True)),
    "glu": FewSpec(LinearSpec(200, 96, 128, BF16, has_bias=True, glu=True)),
    "norm": FewSpec(LINEAR, RMS),
    "norm of a sum": FewSpec(LINEAR, dataclasses.replace(RMS, has_residual=True)),
    "layer norm kept": FewSpec(
        LINEAR, NormSpec(200, BF16, "layer", has_residual=True, has_bias=True, keep=True)
    ),
}


def composite(call: FewCall) -> tuple[torch.Tensor, ...]:
    """What the op gives that the call is made for."""
    packed, linear = call.quantized(*ops.quantize_act(call.x)).packed(), call.spec.linear
    weight = (
        packed.qweight, packed.channel_scale, packed.group_word, packed.channel_zero, call.bias,
        call.residual, linear.dtype, linear.glu,
    )  # fmt: skip
    norm = call.norm
    if norm is None:
        empty = call.x.new_empty(0)
        return ops.quant_linear(call.x, *weight), empty, empty
    results: tuple[torch.Tensor, ...] = ops.norm_linear(
        call.x, call.norm_residual, call.norm_weight, call.norm_bias, norm.kind, norm.eps,
        norm.offset, norm.round_first, norm.keep, *weight,
    )  # fmt: skip
    return results


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_definition_is_the_op(spec: FewSpec) -> None:
    call = random_call(spec, 3, CPU)
    assert call.spec == spec
    assert call.tokens == 3
    got, room, want = definition(call), call.empty_outputs(), composite(call)
    for a, b, c in zip(got, room, want, strict=True):
        assert a.shape == b.shape == c.shape
        assert a.dtype == b.dtype == c.dtype
        assert torch.equal(a, c)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_trial_judges_all_outputs_that_are_wanted(spec: FewSpec) -> None:
    copies: list[int] = []

    def start(kernel: Launch, call: FewCall, outputs: Outputs) -> None:
        copies.append(call.qweight.data_ptr())
        for output, value in zip(outputs, definition(call), strict=True):
            output.copy_(value)

    class Stub:
        tile = Tile(())

        def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
            raise AssertionError("the launcher launches")

    trial = trial_with(start)(spec, 2, CPU)
    trial.clear()
    expected = trial.expected()
    wanted = 1 if spec.norm is None else 1 + spec.norm.has_residual + spec.norm.keep
    assert len(expected) == wanted
    trial.rotate(2)
    for copy in (0, 1):
        got = trial.sample(trial(Stub(), copy))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert copies[0] != copies[1]
    trial.clear()
    assert not any(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert trial.cold_bytes > 200 * 96 // 2


def test_a_spec_is_plain_json() -> None:
    values = to_json(SPECS["norm of a sum"])
    assert values["linear.out_features"] == 96
    assert values["linear.dtype"] == values["norm.dtype"] == "bfloat16"
    assert to_json(SPECS["alone"])["norm"] is None


def test_few_tokens_of_one_dtype_are_taken() -> None:
    for tokens in range(MAX_TOKENS + 2):
        x = torch.empty(1, tokens, 8, dtype=BF16)
        assert takes(x, BF16) is (1 <= tokens <= MAX_TOKENS)
        assert not takes(x, torch.float32)


def arguments(**changes: Any) -> dict[str, Any]:
    packed = quantize_weight(torch.randn(96, 200), 128)
    return {
        "x": torch.randn(1, 2, 200).to(BF16),
        "norm": None,
        "qweight": packed.qweight,
        "channel_scale": packed.channel_scale,
        "group_word": packed.group_word,
        "channel_zero": None,
        "bias": None,
        "residual": None,
        "dtype": BF16,
        "glu": False,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": FP16}, "x must be of the dtype of the result, torch.float16"),
        ({"x": torch.zeros(2, 200, dtype=torch.int8), "dtype": torch.int8}, "x must be bfloat16"),
        ({"x": torch.zeros(2, 300).to(BF16)}, "qweight must be torch.uint8"),
        ({"group_word": None}, "one"),
        ({"bias": torch.zeros(95).to(BF16)}, "bias must be"),
        ({"residual": torch.zeros(2, 96).to(BF16)}, "residual must be"),
        ({"residual": torch.zeros(1, 2, 96).to(BF16), "glu": True}, "no residual"),
        ({"bias": torch.zeros(96, dtype=BF16, device="meta")}, "must be on one device"),
    ],
)
def test_what_does_not_fit_is_an_error(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call_of(**arguments(**changes))


def test_a_norm_brings_its_tensors() -> None:
    x, residual, weight = torch.randn(1, 2, 200), torch.randn(1, 2, 200), torch.randn(200)
    norm = norm_call.call_of(x, residual, weight, None, "rms", 1e-6, 1.0, False, True)
    call = call_of(**arguments(x=x, norm=norm, dtype=torch.float32))
    assert call.norm is norm.spec
    assert (call.norm_residual, call.norm_weight, call.norm_bias) == (residual, weight, None)
    y, total, normed = call.empty_outputs()
    assert y.shape == (1, 2, 96)
    assert total.shape == normed.shape == x.shape


def test_rows_are_two_dimensional_with_neighbouring_channels() -> None:
    x = torch.randn(200, 2).t()[None].to(BF16)
    call = call_of(**arguments(x=x))
    assert call.rows(x).shape == (2, 200)
    assert call.rows(x).stride() == (200, 1)
    flat = torch.randn(1, 2, 400).to(BF16)[..., :200]
    assert call.rows(flat).data_ptr() == flat.data_ptr()
