"""Norms in front of quantized linears become one op, in every spelling, and no value changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.passes import manager
from qoqc.passes.cleanup import cleanup
from qoqc.passes.context import Context
from qoqc.passes.fuse_act import fuse_act
from qoqc.passes.fuse_norm import fuse_norm
from qoqc.passes.linear import linear
from qoqc.passes.share_quant import share_quant
from qoqc.runtime.dynamo import copy_graph
from qoqc.testing import capture, context, run_graph, targets, tiny_model

IDS = torch.arange(3, 9)[None]

# norms in front of quantized linears, residual additions in them, norms also read in 16 bit
FUSED = {
    "llama": (4, 3, 0),
    "qwen2": (4, 3, 0),
    "gemma": (4, 3, 0),  # 1 + weight, in fp32
    "gemma2": (4, 3, 0),  # norms behind the linears, too: those stay
    "gpt_neox": (4, 1, 0),  # two norms of one sum: the second finds it made
    "opt": (4, 1, 0),  # a reshape between sum and norm
    "cohere": (2, 1, 0),  # LayerNorm written out
    "olmo2": (0, 0, 0),  # norms behind the linears only
    "deepseek_v3": (6, 3, 1),  # the router reads a norm, too
    "mixtral": (2, 1, 0),
}


def norms(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is ops.norm_quant]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FUSED)
def test_families(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, and logits equal bit for bit to those of the graph without the fusing passes."""
    gm, inputs = capture(tiny_model(family, dtype), IDS, use_cache=False)
    logits: list[Tensor] = []
    fusing = (fuse_norm, fuse_act)
    plain = tuple(step for step in manager.PIPELINE if step not in fusing)
    for pipeline in (plain, manager.PIPELINE):
        graph = copy_graph(gm)
        ctx = context(graph, inputs)
        monkeypatch.setattr(manager, "PIPELINE", pipeline)
        manager.run(graph, ctx)
        logits.append(run_graph(graph, ctx)[0])
    assert torch.equal(*logits)
    found = norms(graph)
    sums, kept = (sum(bool(node.args[i]) for node in found) for i in (1, -1))
    assert (len(found), sums, kept) == FUSED[family]
    assert ctx.counts["fuse_norm"] == len(found)
    assert ctx.unfused == []


# one norm in front of one linear


class Normed(nn.Module):
    """linear(norm(x)); `norm(x, w)` is a function."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64).to(dtype))
        self.linear = nn.Linear(64, 32).to(dtype)

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.norm(x, self.weight))


def fuse(module: nn.Module, *args: Tensor) -> tuple[int, GraphModule, Context]:
    """The fused graph; asserts that its results are those it had before."""
    gm, inputs = capture(module, *args)
    ctx = context(gm, inputs)
    linear(gm, ctx)
    share_quant(gm, ctx)
    before = run_graph(gm, ctx)
    count = fuse_norm(gm, ctx)
    cleanup(gm, ctx)
    for a, b in zip(_tuple(before), _tuple(run_graph(gm, ctx)), strict=True):
        assert torch.equal(a, b)
    return count, gm, ctx


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def centred(x: Tensor) -> Tensor:
    x = x.float()
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5)


BF16, FP32 = torch.bfloat16, torch.float32

SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[Any, ...]]] = {
    # (kind, eps, offset, round_first)
    "round, then weight": (lambda x, w: w * unit(x.float()).to(x.dtype), ("rms", 1e-6, 0.0, True)),
    "weight, then round": (lambda x, w: (w * unit(x.float())).to(x.dtype),
                           ("rms", 1e-6, 0.0, False)),
    "one plus weight": (lambda x, w: (unit(x.float()) * (1.0 + w.float())).type_as(x),
                        ("rms", 1e-6, 1.0, False)),
    "square by product": (lambda x, w: w * (x.float() * torch.rsqrt(
        (x.float() * x.float()).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
        ("rms", 1e-6, 0.0, True)),
    "square": (lambda x, w: w * (x.float() * torch.rsqrt(
        x.float().square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype),
        ("rms", 1e-6, 0.0, True)),
    "no weight": (lambda x, w: unit(x.float()).to(x.dtype), ("rms", 1e-6, 0.0, False)),
    "computed weight": (lambda x, w: (w + 1) * unit(x.float()).to(x.dtype),
                        ("rms", 1e-6, 0.0, True)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (64,), w, 1e-5), ("rms", 1e-5, 0.0, False)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (64,), w), ("layer", 1e-5, 0.0, False)),
    "layer_norm with bias": (lambda x, w: F.layer_norm(x, (64,), w, w - 1, eps=1e-3),
                             ("layer", 1e-3, 0.0, False)),
    "centred": (lambda x, w: (w.float() * centred(x)).to(x.dtype),
                ("centred", 1e-5, 0.0, False)),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    norm, expected = SPELLINGS[name]
    count, gm, _ = fuse(Normed(norm, BF16), torch.randn(2, 5, 64).bfloat16())
    assert count == 1
    (node,) = norms(gm)
    assert tuple(node.args[4:8]) == expected
    left = targets(gm)
    assert not {"rsqrt", "pow", "mean", "layer_norm", "quantize_act"} & set(left)


REASONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "in bf16": (lambda x, w: w * unit(x), "computed in torch.bfloat16, not in float32"),
    "fp32 weight": (lambda x, w: (w.float() * 2 * unit(x.float())).to(x.dtype),
                    "its weight is torch.float32, what it normalizes torch.bfloat16"),
    "fp32 result": (lambda x, w: unit(x.float()),
                    "another shape or dtype comes out than goes in"),
    "max for mean": (lambda x, w: w * (x.float() * torch.rsqrt(
        x.float().abs().amax(-1, keepdim=True) + 1e-6)).to(x.dtype),
        "its root is not that of a mean of squares + eps"),
    "of another value": (lambda x, w: w * (x.float() * torch.rsqrt(
        (x * 2).float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
        "its root is not that of a mean of squares + eps"),
    "default eps": (lambda x, w: F.rms_norm(x, (64,), w), "eps is None, not a number"),
    "two axes": (lambda x, w: F.layer_norm(x, (5, 64)), "normalizes 2 axes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_rounds_in_another_way_stays(name: str) -> None:
    norm, reason = REASONS[name]
    module = Normed(norm, FP32 if name == "fp32 result" else BF16)
    x = torch.randn(2, 5, 64).bfloat16()
    count, gm, ctx = fuse(module, x)
    assert count == 0
    assert targets(gm)["quantize_act"] == 1
    (left,) = ctx.unfused
    assert left.reason == reason
    assert left.name.startswith("norm ")
    assert ctx.refusals == []


def test_rounding_that_is_cast_away_is_seen() -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        return (w.float() * unit(x.float()).to(x.dtype).float()).to(x.dtype)

    # equal or left alone, which fuse() asserts: as "weight, then round" it would be wrong
    assert fuse(Normed(norm, BF16), torch.randn(20, 64).bfloat16())[0] == 0


def test_what_is_no_norm_is_left_without_a_word() -> None:
    count, _, ctx = fuse(Normed(lambda x, w: x * w, BF16), torch.randn(2, 64).bfloat16())
    assert (count, ctx.unfused) == (0, [])


# what stands around it


class Block(nn.Module):
    """A residual addition, a norm, a linear; subclasses change what else reads or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64))
        self.linear = nn.Linear(64, 64)

    def norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (64,), self.weight)

    def forward(self, x: Tensor, r: Tensor) -> Any:
        total = x + r
        return total + self.linear(self.norm(total))


def fused(block: Block) -> tuple[bool, bool, bool] | None:
    """(residual taken in, norm kept, any left alone) or None if nothing was fused."""
    count, gm, _ = fuse(block, torch.randn(3, 64), torch.randn(3, 64))
    found = norms(gm)
    assert len(found) == count
    if not found:
        return None
    return found[0].args[1] is not None, bool(found[0].args[-1]), "add" in targets(gm)


def test_the_sum_is_taken_in_and_read_on() -> None:
    assert fused(Block()) == (True, False, True)


def test_other_readers_of_the_norm_read_it_in_16_bit() -> None:
    class Two(Block):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            normed = self.norm(x + r)
            return self.linear(normed), normed.sigmoid()

    assert fused(Two()) == (True, True, False)


def test_a_reader_of_the_sum_before_the_norm_keeps_the_addition() -> None:
    class Early(Block):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            total = x + r
            early = total.sigmoid()
            return early, self.linear(self.norm(total))

    assert fused(Early()) == (False, False, True)


def test_a_broadcast_addition_is_no_residual() -> None:
    class Broadcast(Block):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            return self.linear(self.norm(x + r[:1]))

    assert fused(Broadcast()) == (False, False, True)


def test_a_scaled_addition_is_no_residual() -> None:
    class Scaled(Block):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            return self.linear(self.norm(torch.add(x, r, alpha=2)))

    assert fused(Scaled()) == (False, False, True)


def test_an_augmented_addition_is_no_residual() -> None:
    class Augmented(Block):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            y = x * 1
            y += r
            return self.linear(self.norm(y)), y

    assert fused(Augmented()) == (False, False, False)


@pytest.mark.parametrize("which", ["term", "sum", "norm"])
def test_a_write_on_the_way_keeps_all(which: str) -> None:
    class Written(Block):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            x = x * 1
            total = x + r
            normed = self.norm(total)
            {"term": x, "sum": total, "norm": normed}[which].add_(1)
            return total, normed, self.linear(normed)

    assert fused(Written()) is None


def test_a_write_afterwards_does_not_matter() -> None:
    class After(Block):
        def forward(self, x: Tensor, r: Tensor) -> Any:
            total = x + r
            y = self.linear(self.norm(total))
            return y, total.add_(1)

    assert fused(After()) == (True, False, False)
