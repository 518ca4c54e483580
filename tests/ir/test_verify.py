"""Each rule of ir/verify.py, kept by a good graph and broken once on purpose."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

from qoqc.errors import VerifyError
from qoqc.ir import ops
from qoqc.ir.spec import KVSpec
from qoqc.ir.verify import check, writes
from qoqc.passes.fuse_glu import fuse_glu
from qoqc.passes.linear import linear
from qoqc.passes.merge import merge
from qoqc.runtime.kv_layers import KV4Layer
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


def gated() -> GraphModule:
    """silu(gate) * up as one quantized op."""
    gate, up = nn.Linear(64, 32), nn.Linear(64, 32)

    def f(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = nn.functional.silu(gate(x)) * up(x)
        return out

    gm, inputs = capture(f, torch.randn(2, 64))
    ctx = context(gm, inputs)
    for step in (merge, fuse_glu, linear):
        step(gm, ctx)
    return gm


def test_rules_of_linears_hold_for_the_gated_one_too() -> None:
    gm = gated()
    before = writes(gm.graph)
    check(gm, before)
    (node,) = of(gm, ops.w4a8_glu)
    spec = node.meta["qoqc"]
    node.meta["qoqc"] = dataclasses.replace(spec, glu=False)
    with pytest.raises(VerifyError, match="its spec says glu=False"):
        check(gm, before)
    node.meta["qoqc"] = dataclasses.replace(spec, out_features=48)
    with pytest.raises(VerifyError, match="24 output channels instead of 32"):
        check(gm, before)
    node.meta["qoqc"] = spec
    node.args = (node.args[1], node.args[0], *node.args[2:])
    with pytest.raises(VerifyError, match="argument 0 is not output 0 of a quantizing op"):
        check(gm, before)


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


def decode_step() -> tuple[GraphModule, Node]:
    """A graph of one kv4_decode with angles and without head norm, and its node."""
    layer = KV4Layer(64, 4, "exact")
    layer.allocate(1, KVSpec(2, 8, 8), torch.device("cpu"))

    def f(q: torch.Tensor, k: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        pages = (layer.k_pages, layer.v_pages, layer.kv_words, layer.block_table)
        out: torch.Tensor = ops.kv4_decode(
            q, k, k, None, None, angles, angles, *pages, layer.length, None, None,
            "half", 0.0, 0.0, False, 1.0, 0.0, 4,
        )  # fmt: skip
        return out

    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
    gm, _ = capture(f, q, k, torch.ones(1, 1, 8))
    (node,) = of(gm, ops.kv4_decode)
    return gm, node


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (14, "twisted", "rotates in the form 'twisted'"),
        (14, "none", "form 'none' with angles"),
        (6, None, "form 'half' with angles"),
        (3, 0, "norms only one of queries and keys"),
        (5, 0, "angles .1, 4, 1, 8. for queries"),
    ],
)
def test_broken_rotation_is_named(position: int, value: object, message: str) -> None:
    """A value of 0 stands for the queries, put where they do not belong."""
    gm, node = decode_step()
    before = writes(gm.graph)
    assert before["kv4_append"] == before["add_"] == 1
    check(gm, before)
    other: Any = node.args[0] if value == 0 else value
    node.args = (*node.args[:position], other, *node.args[position + 1 :])
    with pytest.raises(VerifyError, match=message):
        check(gm, before)


def test_a_decode_step_of_several_tokens_is_named() -> None:
    gm, node = decode_step()
    query = node.args[0]
    assert isinstance(query, Node)
    query.meta["example_value"] = query.meta["example_value"].expand(1, 4, 3, 8)
    with pytest.raises(VerifyError, match="a decode step of 3 tokens per sequence"):
        check(gm, writes(gm.graph))
