"""Activations in front of quantized linears become one op, and no value changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from qoqc.ir import ops
from qoqc.passes import manager
from qoqc.passes.context import Context
from qoqc.passes.fuse_act import fuse_act
from qoqc.passes.fuse_glu import fuse_glu
from qoqc.passes.linear import linear
from qoqc.runtime.dynamo import copy_graph
from qoqc.testing import capture, context, run_graph, targets, tiny_model

Act = Callable[[Tensor, Tensor], Any]


class Down(nn.Module):
    """linear(act(g, u))."""

    def __init__(self, act: Act, dtype: torch.dtype) -> None:
        super().__init__()
        self.act = act
        self.linear = nn.Linear(64, 32).to(dtype)

    def forward(self, x: Tensor) -> Any:
        gate, up = x.chunk(2, -1)
        value = self.act(gate, up)
        if isinstance(value, tuple):
            return self.linear(value[0]), value[1]
        return self.linear(value)


def fuse(act: Act, dtype: torch.dtype = torch.bfloat16) -> tuple[int, GraphModule, Context]:
    """The fused graph; asserts that its results are those it had before."""
    gm, inputs = capture(Down(act, dtype), torch.randn(2, 5, 128).to(dtype))
    ctx = context(gm, inputs)
    linear(gm, ctx)
    before = run_graph(gm, ctx)
    count = fuse_act(gm, ctx)
    after = run_graph(gm, ctx)
    pairs = zip(before, after, strict=True) if isinstance(before, tuple) else [(before, after)]
    for a, b in pairs:
        assert torch.equal(a, b)
    return count, gm, ctx


FUSED: dict[str, tuple[Act, tuple[str, bool]]] = {
    "silu": (lambda g, u: F.silu(g) * u, ("silu", True)),
    "up first": (lambda g, u: u * F.silu(g), ("silu", True)),
    "gelu": (lambda g, u: F.gelu(g) * u, ("gelu", True)),
    "gelu tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, ("gelu_tanh", True)),
    "relu": (lambda g, u: torch.relu(g) * u, ("relu", True)),
    "alone": (lambda g, u: F.gelu(g), ("gelu", False)),
    "relu alone": (lambda g, u: F.relu(g), ("relu", False)),
    "method": (lambda g, u: g.relu(), ("relu", False)),
    "itself": (lambda g, u: F.silu(g) * g, ("silu", True)),
    "both": (lambda g, u: F.silu(g) * F.gelu(u), ("silu", True)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", FUSED)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    act, (kind, gated) = FUSED[name]
    count, gm, _ = fuse(act, dtype)
    assert count == 1
    (node,) = [node for node in gm.graph.nodes if node.target is ops.act_quant]
    assert node.args[2] == kind
    assert (node.args[1] is not None) == gated
    left = targets(gm)
    assert not {"quantize_act", "silu", "relu", "mul"} & set(left)
    assert ("gelu" in left) == (name == "both")


WRITTEN = "something on the way is written in place"

LEFT: dict[str, tuple[Act, str | None]] = {
    "squared": (lambda g, u: torch.relu(g).square(), None),
    "scaled": (lambda g, u: F.silu(g) * 2.0, None),
    "sigmoid": (lambda g, u: g * torch.sigmoid(g), None),
    "in place": (lambda g, u: F.silu(g * 1, inplace=True), WRITTEN),
    "broadcast": (lambda g, u: F.silu(g) * u[:1], "its branches differ in shape or dtype"),
    "also read": (lambda g, u: (y := F.silu(g) * u, y.sigmoid()), "it is also read in 16 bit"),
    "written": (lambda g, u: _written(g, u), WRITTEN),
}  # fmt: skip


def _written(g: Tensor, u: Tensor) -> Tensor:
    u = u * 1
    y = F.silu(g)
    z = y * u
    u.add_(1)
    return z


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    act, reason = LEFT[name]
    count, gm, ctx = fuse(act)
    assert count == 0
    assert targets(gm)["quantize_act"] == 1
    assert [left.reason for left in ctx.unfused] == ([] if reason is None else [reason])
    assert ctx.refusals == []


def test_an_activation_with_another_reader_is_computed_for_it() -> None:
    count, gm, _ = fuse(lambda g, u: ((y := F.silu(g)) * u, y.sigmoid()))
    assert count == 1
    assert targets(gm)["silu"] == 1


@pytest.mark.parametrize(
    ("family", "count"),
    [("llama", 2), ("phi3", 2), ("gpt_neox", 2), ("opt", 2), ("gemma", 2), ("phi", 0)],
)
def test_families(family: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits equal those of the graph without this pass; phi writes its GELU out."""
    ids = torch.arange(3, 9)[None]
    gm, inputs = capture(tiny_model(family, torch.bfloat16), ids, use_cache=False)
    logits: list[Tensor] = []
    # fuse_glu takes what it can before this pass sees it
    fused = tuple(step for step in manager.PIPELINE if step is not fuse_glu)
    plain = tuple(step for step in fused if step is not fuse_act)
    for pipeline in (plain, fused):
        graph = copy_graph(gm)
        ctx = context(graph, inputs)
        monkeypatch.setattr(manager, "PIPELINE", pipeline)
        manager.run(graph, ctx)
        logits.append(run_graph(graph, ctx)[0])
    assert torch.equal(*logits)
    assert ctx.counts["fuse_act"] == targets(graph)["act_quant"] == count
