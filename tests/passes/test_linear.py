"""linear: the rewritten graph computes what the packed weights say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qoqc.ir import ops
from qoqc.ir.spec import LinearSpec
from qoqc.passes.cleanup import cleanup
from qoqc.passes.linear import linear
from qoqc.passes.normalize import normalize
from qoqc.quant.activation import quantize_act
from qoqc.quant.weight import dequantize_weight, quantize_weight
from qoqc.testing import capture, context, run_graph, targets


def by_definition(x: Tensor, weight: Tensor, bias: Tensor | None, group_size: Any) -> Tensor:
    xq, scale, _ = quantize_act(x)
    w = dequantize_weight(quantize_weight(weight, group_size)).double()
    y = (xq.double() * scale[..., None].double()) @ w.t()
    return (y if bias is None else y + bias.double()).to(x.dtype)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_spec(group_size: Any, bias: bool, dtype: torch.dtype) -> None:
    module, x = nn.Linear(192, 80, bias, dtype=dtype), torch.randn(2, 3, 192, dtype=dtype)
    gm, inputs = capture(module, x)
    ctx = context(gm, inputs, group_size=group_size)
    normalize(gm, ctx)
    assert linear(gm, ctx) == 1
    cleanup(gm, ctx)
    (node,) = [n for n in gm.graph.nodes if n.target is ops.w4a8_linear]
    assert node.meta["qoqc"] == LinearSpec(192, 80, group_size, dtype, has_bias=bias)
    assert targets(gm)["linear"] == 0
    got = run_graph(gm, ctx)[0]
    expected = by_definition(x, module.weight, module.bias, group_size)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)
    # the 16-bit weight is no longer an input, the packed tensors are
    kept = {id(n) for n in gm.graph.nodes}
    assert not any(ctx.values[n] is module.weight for n in ctx.values if id(n) in kept)
    assert len(ctx.bound) == 3


def test_transposed_weight() -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    module = nn.Module()
    module.weight = weight
    x = torch.randn(5, 64)
    gm, inputs = capture(lambda x: x @ module.weight, x)
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    assert linear(gm, ctx) == 1
    expected = by_definition(x, weight.detach().t(), None, 128)
    torch.testing.assert_close(run_graph(gm, ctx)[0], expected)


def test_one_weight_used_twice_is_packed_once() -> None:
    module, x = nn.Linear(64, 64), torch.randn(3, 64)
    gm, inputs = capture(lambda x: module(module(x)), x)
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    assert linear(gm, ctx) == 2
    assert len(ctx.bundles) == 1
    assert len(ctx.bound) == 3
    inner = by_definition(x, module.weight, module.bias, 128)
    expected = by_definition(inner, module.weight, module.bias, 128)
    torch.testing.assert_close(run_graph(gm, ctx)[0], expected)


def test_second_graph_uses_the_same_bundle() -> None:
    module = nn.Linear(64, 64)
    bundles = []
    store = None
    for tokens in (3, 1):
        gm, inputs = capture(module, torch.randn(tokens, 64))
        ctx = context(gm, inputs)
        store = ctx.store = store or ctx.store
        linear(gm, ctx)
        bundles.append(ctx.bundles[0][0])
    assert bundles[0] is bundles[1]
