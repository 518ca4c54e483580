"""Each rule of ir/verify.py, kept by a good graph and broken once on purpose."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from qoqc.errors import VerifyError
from qoqc.ir import ops
from qoqc.ir.verify import check, writes
from qoqc.passes.linear import linear
from qoqc.testing import capture, context


def good() -> GraphModule:
    """Two quantized linears of different inputs, and a counter that is written."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)

    def f(x: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
        counter.add_(1)
        out: torch.Tensor = second(first(x))
        return out

    gm, inputs = capture(f, torch.randn(2, 64), torch.zeros(1))
    linear(gm, context(gm, inputs))
    return gm


def of(gm: GraphModule, target: object) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def drop_write(gm: GraphModule) -> None:
    (add,) = [node for node in gm.graph.nodes if node.target == "add_"]
    gm.graph.erase_node(add)


def add_write(gm: GraphModule) -> None:
    (add,) = [node for node in gm.graph.nodes if node.target == "add_"]
    with gm.graph.inserting_after(add):
        gm.graph.call_function(operator.setitem, (add.args[0], 0, 1))


def swap_parts(gm: GraphModule) -> None:
    node = of(gm, ops.w4a8_linear)[0]
    xq, scale, total, *rest = node.args
    node.args = (xq, total, scale, *rest)


def mix_sources(gm: GraphModule) -> None:
    first, second = of(gm, ops.w4a8_linear)
    second.args = (first.args[0], *second.args[1:])


def unquantized_input(gm: GraphModule) -> None:
    node = of(gm, ops.w4a8_linear)[0]
    node.args = (of(gm, ops.quantize_act)[0].args[0], *node.args[1:])


def wrong_dtype(gm: GraphModule) -> None:
    node = of(gm, ops.w4a8_linear)[0]
    node.args = (*node.args[:-1], torch.float16)


def no_spec(gm: GraphModule) -> None:
    of(gm, ops.w4a8_linear)[0].meta.pop("qoqc")


def wrong_width(gm: GraphModule) -> None:
    node = of(gm, ops.w4a8_linear)[0]
    node.meta["example_value"] = node.meta["example_value"][..., :32]


def quantize_integers(gm: GraphModule) -> None:
    quantize = of(gm, ops.quantize_act)[0]
    source = quantize.args[0]
    assert isinstance(source, Node)
    source.meta["example_value"] = source.meta["example_value"].int()


def test_good_graph_passes() -> None:
    gm = good()
    check(gm, writes(gm.graph))
    assert writes(gm.graph)["add_"] == 1


def test_a_fused_quantizer_is_one_too() -> None:
    """The outputs of act_quant feed a linear; those behind the third of norm_quant do not."""
    gm = good()
    quantize = of(gm, ops.quantize_act)[0]
    quantize.target, quantize.args = ops.act_quant, (quantize.args[0], None, "relu")
    check(gm, writes(gm.graph))
    quantize.target = ops.norm_quant
    quantize.args = (quantize.args[0], None, None, None, "rms", 1e-6, 0.0, False, True)
    check(gm, writes(gm.graph))
    part = of(gm, ops.w4a8_linear)[0].args[0]
    assert isinstance(part, Node)
    part.args = (quantize, 4)
    with pytest.raises(VerifyError, match="argument 0 is not output 0 of a quantizing op"):
        check(gm, writes(gm.graph))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_write, "in-place operations changed"),
        (add_write, "in-place operations changed"),
        (swap_parts, "argument 1 is not output 1 of a quantizing op"),
        (unquantized_input, "argument 0 is not output 0 of a quantizing op"),
        (mix_sources, "activation inputs come from different quantizing ops"),
        (wrong_dtype, "dtype torch.float16 instead of torch.float32"),
        (no_spec, "no spec or example value"),
        (wrong_width, "64 output channels instead of 32"),
        (quantize_integers, "quantizes torch.int32"),
    ],
)
def test_broken_graph_is_named(damage: Callable[[GraphModule], None], message: str) -> None:
    gm = good()
    before = writes(gm.graph)
    damage(gm)
    with pytest.raises(VerifyError, match=message):
        check(gm, before)
