"""An op called again: what was checked once must not let the next call pass that is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qoqc.codegen import dispatch
from qoqc.codegen.kernels.rotate_append_call import RotateSpec, random_call
from qoqc.ir.spec import KVSpec
from qoqc.quant.activation import quantize_act
from qoqc.quant.weight import quantize_weight

Arguments = dict[str, Any]
Change = Callable[[torch.Tensor], torch.Tensor]


def linear(device: torch.device, *, glu: bool = False) -> Arguments:
    torch.manual_seed(0)
    packed = quantize_weight(torch.randn(64, 128), 128)
    xq, token_scale, token_sum = quantize_act(torch.randn(2, 3, 128))
    tensors = {
        "xq": xq,
        "token_scale": token_scale,
        "token_sum": token_sum,
        "qweight": packed.qweight,
        "channel_scale": packed.channel_scale,
        "group_word": packed.group_word,
        "channel_zero": None,
        "bias": None,
        "residual": torch.randn(2, 3, 64).half(),
    }
    if glu:
        del tensors["residual"]
    return {**moved(tensors, device), "dtype": torch.float16}


def norm(device: torch.device) -> Arguments:
    x, residual, weight = torch.randn(3, 4, 64).half()
    tensors = {"x": x, "residual": residual, "weight": weight[0], "bias": None}
    rest = {"kind": "rms", "eps": 1e-6, "offset": 0.0, "round_first": False, "keep": True}
    return {**moved(tensors, device), **rest}


def act(device: torch.device) -> Arguments:
    gate, up = torch.randn(2, 4, 64).half()
    return {**moved({"gate": gate, "up": up}, device), "kind": "silu"}


def rotate(device: torch.device) -> Arguments:
    spec = RotateSpec(4, KVSpec(2, 32, 32, 4), torch.float16, "half", 32)
    call = random_call(spec, 2, 3, device)
    return {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}


def moved(tensors: Arguments, device: torch.device) -> Arguments:
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}


OPS: dict[str, tuple[Callable[..., Any], Callable[[torch.device], Arguments]]] = {
    "w4a8_linear": (dispatch.w4a8_linear, linear),
    "w4a8_glu": (dispatch.w4a8_glu, lambda device: linear(device, glu=True)),
    "norm_quant": (dispatch.norm_quant, norm),
    "act_quant": (dispatch.act_quant, act),
    "kv4_rotate_append": (dispatch.kv4_rotate_append, rotate),
}


def gapped(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of another tensor."""
    return torch.stack([x, x], dim=-1)[..., 0]


WRONG: list[tuple[str, str, Change, str]] = [
    ("w4a8_linear", "xq", torch.Tensor.short, "xq must be torch.int8"),
    ("w4a8_linear", "token_scale", torch.Tensor.half, "token_scale must be torch.float32"),
    ("w4a8_linear", "token_sum", torch.Tensor.float, "token_sum must be torch.int32"),
    ("w4a8_linear", "residual", torch.Tensor.float, "residual must be torch.float16"),
    ("w4a8_linear", "residual", lambda x: x[:1], "residual must be"),
    ("w4a8_linear", "qweight", lambda x: x.to("meta"), "on one device"),
    ("w4a8_linear", "channel_scale", lambda x: x[:32], "group_word must be"),
    ("w4a8_glu", "channel_scale", lambda x: x[:1], "must be"),
    ("w4a8_glu", "xq", lambda x: x.to("meta"), "on one device"),
    ("norm_quant", "residual", torch.Tensor.float, "residual must be torch.float16"),
    ("norm_quant", "weight", lambda x: x[:8], "weight must be"),
    ("norm_quant", "x", torch.Tensor.double, "x must be bfloat16, float16 or float32"),
    ("norm_quant", "residual", lambda x: x.to("meta"), "on one device"),
    ("act_quant", "up", torch.Tensor.float, "up must be"),
    ("act_quant", "up", lambda x: x[:1], "up must be"),
    ("act_quant", "gate", lambda x: x.to("meta"), "on one device"),
    ("kv4_rotate_append", "k", torch.Tensor.float, "must have one"),
    ("kv4_rotate_append", "k_pages", gapped, "k_pages has strides"),
    ("kv4_rotate_append", "start", lambda x: x[:1], "start is"),
    ("kv4_rotate_append", "cos", lambda x: x[:, :2], "cos"),
    ("kv4_rotate_append", "cos", lambda x: x.to("meta"), "on one device"),
    ("kv4_rotate_append", "block_table", torch.Tensor.long, "block_table is torch.int64"),
]


@pytest.mark.parametrize(("op", "name", "change", "message"), WRONG)
def test_a_wrong_call_after_a_right_one_is_refused(
    op: str, name: str, change: Change, message: str, device: torch.device
) -> None:
    run, make = OPS[op]
    arguments = make(device)
    run(*arguments.values())
    wrong = {**arguments, name: change(arguments[name])}
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            run(*wrong.values())
    run(*arguments.values())


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("w4a8_linear", "xq"),
        ("w4a8_linear", "token_scale"),
        ("w4a8_linear", "qweight"),
        ("w4a8_linear", "residual"),
        ("norm_quant", "x"),
        ("norm_quant", "residual"),
        ("norm_quant", "weight"),
        ("act_quant", "gate"),
        ("act_quant", "up"),
        ("kv4_rotate_append", "q"),
        ("kv4_rotate_append", "k"),
        ("kv4_rotate_append", "v"),
        ("kv4_rotate_append", "sin"),
    ],
)
def test_gaps_after_none_change_no_result(op: str, name: str, device: torch.device) -> None:
    run, make = OPS[op]
    arguments = make(device)
    want = run(*arguments.values())
    other = gapped(arguments[name])
    assert not other.is_contiguous()
    for changed in (other, arguments[name], other):
        got = run(*{**arguments, name: changed}.values())
        pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_quantize_act_takes_what_differs_from_the_call_before(device: torch.device) -> None:
    x = torch.randn(4, 6, 32, device=device)
    for case in (x, gapped(x), x.transpose(0, 1), x.half(), x[:, :0], x[..., :0], x[0, 0], x):
        for got, want in zip(dispatch.quantize_act(case), quantize_act(case.cpu()), strict=True):
            assert torch.equal(got.cpu(), want)
    with pytest.raises(ValueError, match="quantize_act: x must be"):
        dispatch.quantize_act(x.double())
