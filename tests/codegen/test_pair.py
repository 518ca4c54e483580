"""Quantizers and linears become one op where nothing else reads what is between, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from qoqc import pipeline
from qoqc.codegen import dispatch
from qoqc.codegen.kernels.few_call import MAX_TOKENS
from qoqc.codegen.lower import lower
from qoqc.codegen.pair import pair
from qoqc.config import Options
from qoqc.ir import ops
from qoqc.parallel.collectives import summed, with_largest
from qoqc.passes import manager
from qoqc.passes.context import Context
from qoqc.testing import capture, context, run_graph, targets, tiny_model

TOKEN = torch.tensor([[3]])

OPS = frozenset({"norm_linear", "quant_linear", "quantize_act", "norm_quant", "act_quant"})
LINEARS = frozenset({"w4a8_linear", "w4a8_glu"})

GELU = {"norm_linear": 4, "quant_linear": 2, "act_quant": 2, "w4a8_linear": 2}
PAIRED = {
    "llama": {"norm_linear": 4, "quant_linear": 4},
    "qwen2": {"norm_linear": 4, "quant_linear": 4},  # with biases
    "qwen3": {"norm_linear": 4, "quant_linear": 4},
    "gemma": GELU,
    "gemma2": GELU,  # norms behind the linears, too: they quantize nothing
    "gpt_neox": GELU,  # two norms of one sum, a linear each
    "falcon": {"norm_linear": 2, "quant_linear": 2, "act_quant": 2, "w4a8_linear": 2},
    "olmo2": {"quant_linear": 8},  # norms behind the linears only
    "deepseek_v3": {"norm_linear": 6, "quant_linear": 6},  # one kept for the router
}
"""The qoqc ops of two layers behind the step; attention is torch's here."""


def rewritten(model: Any, *args: Any, **kwargs: Any) -> tuple[GraphModule, Context]:
    """A captured graph behind all passes."""
    gm, inputs = capture(model, *args, **kwargs)
    ctx = context(gm, inputs)
    manager.run(gm, ctx)
    return gm, ctx


def counted(gm: GraphModule) -> dict[str, int]:
    return {name: count for name, count in targets(gm).items() if name in OPS | LINEARS}


def paired(model: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
    """The ops after the step, whose results must be those before it."""
    gm, ctx = rewritten(model, *args, **kwargs)
    before = run_graph(gm, ctx)
    pair(gm)
    after = run_graph(gm, ctx)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    return counted(gm)


@pytest.mark.parametrize("family", PAIRED)
def test_families(family: str) -> None:
    """Counts, and the same logits bit for bit."""
    assert paired(tiny_model(family, torch.bfloat16), TOKEN, use_cache=False) == PAIRED[family]


def test_biases_in_turns_come_along() -> None:
    model = tiny_model("llama", torch.float16, mlp_bias=True, attention_bias=True)
    assert paired(model, TOKEN, use_cache=False) == PAIRED["llama"]


@pytest.mark.parametrize("tokens", [MAX_TOKENS, MAX_TOKENS + 1])
def test_many_tokens_stay_apart(tokens: int) -> None:
    gm, _ = rewritten(tiny_model("llama"), TOKEN.expand(1, tokens), use_cache=False)
    assert pair(gm) == (8 if tokens <= MAX_TOKENS else 0)


def test_any_number_of_tokens_is_paired() -> None:
    ids = torch.arange(3, 40)[None]
    torch._dynamo.mark_dynamic(ids, 1)
    gm, _ = rewritten(tiny_model("llama"), ids, use_cache=False)
    assert pair(gm) == 8


class Block(nn.Module):
    """A norm and linears, as each test puts them together."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(128)
        self.first = nn.Linear(128, 128)
        self.linears = nn.ModuleList(nn.Linear(128, 256, bias=False) for _ in range(count))
        self.bfloat16()


class Shared(Block):
    """One norm, read by linears that are not merged: the bias of one is computed between them."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        first = self.linears[0](y)
        return first, F.linear(y, self.first.weight, self.first.bias * 2)


class Computed(Block):
    """A bias that depends on more than parameters."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return (F.linear(y, self.first.weight, x.flatten() + 1),)


class HalfBiased(Block):
    """Siblings that are merged, one of them without a bias."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return self.linears[0](y), self.first(y)


class Kept(Block):
    """The residual sum and its norm are also read in 16 bit."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total = x + self.first(x)
        normed = self.norm(total)
        early = normed + 1
        return self.linears[0](normed), total * 2, early


class Written(Block):
    """What is quantized is written before the linear of it has run."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x + 1
        y = self.linears[0](x)
        x.add_(1)
        return y, x


def x_of() -> Tensor:
    return torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(3)).bfloat16()


def test_a_shared_quantizer_stays() -> None:
    assert paired(Shared(2), x_of()) == {"norm_quant": 1, "w4a8_linear": 2}


def test_a_bias_that_is_computed_later_keeps_them_apart() -> None:
    assert paired(Computed(), x_of()) == {"norm_quant": 1, "w4a8_linear": 1}


def test_a_bias_with_zeros_comes_along() -> None:
    assert paired(HalfBiased(), x_of()) == {"norm_linear": 1}


def test_the_sum_and_a_kept_norm_are_outputs() -> None:
    assert paired(Kept(), x_of()) == {"quant_linear": 1, "norm_linear": 1}


def test_the_op_stands_where_the_quantizer_stood() -> None:
    gm, ctx = rewritten(Written(), x_of())
    (quantizer,) = (node for node in gm.graph.nodes if node.target is ops.quantize_act)
    (linear,) = (node for node in gm.graph.nodes if node.target is ops.w4a8_linear)
    (write,) = (node for node in gm.graph.nodes if node.target == "add_")
    write.append(linear)  # right too: the integers are there already
    before = run_graph(gm, ctx)
    assert pair(gm) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run_graph(gm, ctx), strict=True))


def test_another_dtype_stays_apart() -> None:
    gm, _ = rewritten(Written(), x_of())
    (linear,) = (node for node in gm.graph.nodes if node.target is ops.w4a8_linear)
    linear.meta["example_value"] = linear.meta["example_value"].float()
    assert pair(gm) == 0


def test_a_head_in_eight_bit_stays_apart() -> None:
    """It reads the integers twice over."""
    gm, inputs = capture(tiny_model("llama", torch.bfloat16), TOKEN, use_cache=False)
    ctx = context(gm, inputs, lm_head="w8a8")
    manager.run(gm, ctx)
    assert pair(gm) == 8
    assert counted(gm) == {**PAIRED["llama"], "quantize_act": 1, "w4a8_linear": 1}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_lowering_pairs_for_gpus_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "install", lambda *args: None)
    gm, ctx = rewritten(tiny_model("llama"), TOKEN, use_cache=False)
    lower(gm, ctx.bound, torch.device(kind), Options())
    assert (counted(gm) == PAIRED["llama"]) is (kind == "cuda")


def test_compiled_graphs_give_the_same_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Inductor, to which the joined ops are opaque as the others are; lengths change."""
    logits: dict[bool, list[Tensor]] = {}
    joined: list[int] = []
    for join in (False, True):

        def lowered(gm: GraphModule, *args: Any, join: bool = join) -> int:
            joined.append(pair(gm) if join else 0)
            return joined[-1]

        monkeypatch.setattr(pipeline, "lower", lowered)
        torch._dynamo.reset()
        tiny = tiny_model("llama", num_hidden_layers=1)
        model: Any = torch.compile(tiny, backend="qoq")
        with torch.no_grad():
            logits[join] = [
                model(torch.arange(3, 3 + tokens)[None], use_cache=False).logits
                for tokens in (1, 9, 7)
            ]
    assert joined == [0, 0, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(logits[False], logits[True], strict=True))


class Rank(Block):
    """What a rank of several runs between its linears: see qoqc/parallel."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        self.down = nn.Parameter(torch.randn(128, 384), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        piece = with_largest(self.first(x), 256, self.group)
        total = x + summed(F.linear(piece, self.down), self.group).to(x.dtype)
        return self.linears[0](self.norm(total)), total


@pytest.fixture
def group(tmp_path: Path) -> Iterator[str]:
    url = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=url, rank=0, world_size=1)
    world: Any = torch.distributed.group.WORLD
    try:
        yield world.group_name
    finally:
        torch.distributed.destroy_process_group()


def test_exchanges_between_ranks_stand_in_front_of_the_pairs(group: str) -> None:
    assert paired(Rank(group), x_of()) == {"quant_linear": 2, "norm_linear": 1}
