"""SiLU(gate) * up moves into the GEMM, and no bit of any result changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from qoqc.codegen.lower import lower
from qoqc.config import Options
from qoqc.ir import ops
from qoqc.passes import manager
from qoqc.passes.context import Context
from qoqc.passes.fuse_glu import fuse_glu
from qoqc.passes.linear import linear
from qoqc.passes.merge import merge
from qoqc.passes.normalize import normalize
from qoqc.runtime.dynamo import copy_graph
from qoqc.testing import capture, context, run_graph, targets, tiny_model

WIDTH = 40


class Mlp(nn.Module):
    """gate and up, two linears or one, and what is made of them."""

    def __init__(self, act: Callable[..., Any], *, joined: bool, bias: bool, width: int) -> None:
        super().__init__()
        self.act, self.joined = act, joined
        self.both = nn.Linear(128, 2 * width, bias)
        self.gate, self.up = nn.Linear(128, width, bias), nn.Linear(128, width, bias)

    def forward(self, x: Tensor) -> Any:
        gate, up = self.both(x).chunk(2, dim=-1) if self.joined else (self.gate(x), self.up(x))
        return self.act(gate, up)


def rewritten(module: nn.Module, x: Tensor, *, fused: bool, group_size: int) -> tuple[Any, ...]:
    """(rewrites, graph, context, outputs) after linear, with or without fuse_glu before it."""
    gm, inputs = capture(module, x)
    ctx = context(gm, inputs, group_size=group_size)
    normalize(gm, ctx)
    merge(gm, ctx)
    count = fuse_glu(gm, ctx) if fused else 0
    linear(gm, ctx)
    return count, gm, ctx, run_graph(gm, ctx)


def assert_equal(got: Any, expected: Any) -> None:
    """To the bit in 16 bit. In fp32 torch's SiLU itself depends on strides, by a step or two."""
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=0.0)
        else:
            assert torch.equal(a, b)


def check(
    act: Callable[..., Any],
    count: int,
    *,
    joined: bool = False,
    bias: bool = False,
    width: int = WIDTH,
    dtype: torch.dtype = torch.bfloat16,
    group_size: int = 128,
) -> tuple[GraphModule, Context]:
    torch.manual_seed(0)
    module = Mlp(act, joined=joined, bias=bias, width=width).to(dtype).eval()
    x = torch.randn(2, 5, 128).to(dtype)
    *_, expected = rewritten(module, x, fused=False, group_size=group_size)
    found, gm, ctx, got = rewritten(module, x, fused=True, group_size=group_size)
    assert found == count
    assert targets(gm)["w4a8_glu"] == count
    assert_equal(got, expected)
    lower(gm, ctx.bound, torch.device("cpu"), Options())
    lowered = run_graph(gm, ctx)
    assert not {"w4a8_glu", "w4a8_linear"} & set(targets(gm))
    assert_equal(lowered, expected)
    return gm, ctx


def silu_up(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("joined", [False, True])
def test_equal_bits(joined: bool, bias: bool, group_size: int, dtype: torch.dtype) -> None:
    gm, _ = check(silu_up, 1, joined=joined, bias=bias, group_size=group_size, dtype=dtype)
    assert not {"silu", "mul", "split", "chunk"} & set(targets(gm))


def test_up_may_come_first() -> None:
    check(lambda g, u: u * F.silu(g), 1)
    check(lambda g, u: F.silu(u) * g, 1, bias=True)


def test_a_joined_weight_with_the_up_first_stays() -> None:
    _, ctx = check(lambda g, u: F.silu(u) * g, 0, joined=True)
    assert "the up comes first" in str(ctx.unfused[0])


DECLINED: dict[str, tuple[Callable[..., Any], str]] = {
    "gelu": (lambda g, u: F.gelu(g) * u, ""),
    "of itself": (lambda g, u: F.silu(g) * g + u, ""),
    "gate read": (lambda g, u: (F.silu(g) * u, g.sum()), "also read by others"),
    "up read": (lambda g, u: (F.silu(g) * u, u.sum()), "also read by others"),
    "written": (lambda g, u: F.silu(g) * u.add_(1), ""),
    "cast": (lambda g, u: F.silu(g).float() * u.float(), ""),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str) -> None:
    act, reason = DECLINED[name]
    _, ctx = check(act, 0)
    assert reason in "".join(map(str, ctx.unfused))


def test_odd_width_is_declined() -> None:
    _, ctx = check(silu_up, 0, width=36)
    assert "36 channels of the gate are no multiple of 8" in str(ctx.unfused[0])


def test_16bit_linears_stay_as_they_are() -> None:
    module = Mlp(silu_up, joined=False, bias=False, width=WIDTH)
    gm, inputs = capture(module, torch.randn(2, 5, 128))
    ctx = context(gm, inputs, exclude="*")
    normalize(gm, ctx)
    merge(gm, ctx)
    assert fuse_glu(gm, ctx) == 0
    assert targets(gm)["linear"] == 2


def test_the_op_reads_rows_in_turns() -> None:
    gm, ctx = check(silu_up, 1)
    (bundle, placeholders) = ctx.bundles[0]
    assert bundle.glu
    assert len(placeholders) == 2
    stacked = bundle.stacked()
    assert not torch.equal(stacked.channel_scale, bundle.packed.channel_scale)
    params = [ctx.values[node] for node in placeholders]
    for param, rows in zip(params, stacked.channel_scale.split(WIDTH), strict=True):
        packed = ctx.store.packed(param)
        assert packed is not None
        assert torch.equal(packed.channel_scale, rows)
    assert gm.graph.find_nodes(op="call_function", target=ops.quantize_act) == []


@pytest.mark.parametrize(
    ("family", "count"), [("llama", 2), ("phi3", 2), ("qwen3", 2), ("gemma", 0), ("gpt_neox", 0)]
)
def test_families(family: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits equal those of the graph without this pass; gemma's gate is a GELU's."""
    ids = torch.arange(3, 9)[None]
    gm, inputs = capture(tiny_model(family, torch.bfloat16), ids, use_cache=False)
    logits: list[Tensor] = []
    plain = tuple(step for step in manager.PIPELINE if step is not fuse_glu)
    for pipeline in (plain, manager.PIPELINE):
        graph = copy_graph(gm)
        ctx = context(graph, inputs)
        monkeypatch.setattr(manager, "PIPELINE", pipeline)
        manager.run(graph, ctx)
        logits.append(run_graph(graph, ctx)[0])
    assert torch.equal(*logits)
    assert ctx.counts["fuse_glu"] == targets(graph)["w4a8_glu"] == count
