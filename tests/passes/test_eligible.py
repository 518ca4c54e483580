"""Which linears are quantized: every rule, with its text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qoqc.ir.spec import KVSpec
from qoqc.passes.context import Context
from qoqc.passes.linear import linear
from qoqc.passes.normalize import normalize
from qoqc.runtime.kv_layers import KV4Layer
from qoqc.testing import capture, context


class Toy(nn.Module):
    """embedding -> proj -> (logits, head); every weight of another size."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.proj = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(F.silu(self.proj(self.embed(ids))))
        return out


IDS = torch.arange(6)[None]


def quantize(module: Any, *args: Any, **options: Any) -> tuple[int, Context]:
    gm, inputs = capture(module, *args)
    ctx = context(gm, inputs, **options)
    normalize(gm, ctx)
    return linear(gm, ctx), ctx


def only(ctx: Context) -> tuple[str, str, bool]:
    (refusal,) = ctx.refusals
    return refusal.name, refusal.reason, refusal.kept


def test_head_stays() -> None:
    count, ctx = quantize(Toy(), IDS)
    assert count == 1
    assert only(ctx) == ("head", "output head", True)


def test_tied_head_stays() -> None:
    count, ctx = quantize(Toy(tied=True), IDS)
    assert count == 1
    name, reason, kept = only(ctx)
    assert name in ("embed", "head")  # one Parameter under two names
    assert (reason, kept) == ("shares its weight with the embedding", True)


def test_head_behind_a_graph_break_stays() -> None:
    """The embedding was in an earlier graph: the store remembers the table."""
    toy = Toy(tied=True)
    gm, inputs = capture(toy.embed, IDS)
    first = context(gm, inputs)
    linear(gm, first)
    gm, inputs = capture(toy.head, torch.randn(2, 64))
    second = context(gm, inputs)
    second.store = first.store
    assert linear(gm, second) == 0
    assert only(second)[1] == "shares its weight with the embedding"


@pytest.mark.parametrize("pattern", ["proj", "pr*", "*"])
def test_excluded(pattern: str) -> None:
    count, ctx = quantize(Toy(), IDS, exclude=[pattern])
    assert count == 0
    assert ("proj", "excluded", True) in [(r.name, r.reason, r.kept) for r in ctx.refusals]


def test_pattern_of_another_module_excludes_nothing() -> None:
    assert quantize(Toy(), IDS, exclude=["model.proj"])[0] == 1


@pytest.mark.parametrize(
    "pick", [lambda s: torch.topk(s, 2)[0], lambda s: s.softmax(-1).argmax(-1)]
)
def test_routers_stay(pick: Any) -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.proj = nn.Linear(64, 32), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return pick(self.gate(x)), self.proj(x)

    count, ctx = quantize(Router(), torch.randn(3, 64))
    assert count == 1
    assert only(ctx) == ("gate", "router of experts", True)


def test_small_weights_stay() -> None:
    count, ctx = quantize(nn.Linear(64, 31), torch.randn(2, 64))
    assert count == 0
    assert only(ctx)[1] == "31 x 64 is below the smallest size worth packing, 32"


def test_float64_is_refused() -> None:
    count, ctx = quantize(nn.Linear(64, 64).double(), torch.randn(2, 64).double())
    assert count == 0
    assert only(ctx)[1:] == ("dtype float64 is not one of bfloat16, float16, float32", False)


def test_computed_weight_is_refused() -> None:
    module = nn.Linear(64, 64)

    def scaled(x: Tensor) -> Tensor:
        return F.linear(x, module.weight * 0.5)

    count, ctx = quantize(scaled, torch.randn(2, 64))
    assert count == 0
    assert only(ctx)[1:] == ("the weight is computed in the graph, not a parameter", False)


def test_weights_joined_along_the_inputs_are_refused() -> None:
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def joined(x: Tensor) -> Tensor:
        return F.linear(x, torch.cat((first.weight, second.weight), dim=1))

    count, ctx = quantize(joined, torch.randn(2, 128))
    assert count == 0
    assert only(ctx)[1] == "the weight is computed in the graph, not a parameter"


@pytest.mark.parametrize("filled", [False, True])
def test_what_multiplies_the_cache_stays(filled: bool) -> None:
    """MLA: the cache holds latents, expanded at every step. The same in the first prefill."""
    layer = KV4Layer(64, 4, "exact")
    layer.allocate(1, KVSpec(1, 64, 32), torch.device("cpu"))
    latent, rope = torch.randn(1, 1, 3, 64), torch.randn(1, 1, 3, 32)
    if filled:
        layer.update(latent, rope)
    expand = nn.Linear(64, 128)

    def step(latent: Tensor, rope: Tensor) -> Tensor:
        out: Tensor = expand(layer.update(latent, rope)[0])
        return out

    count, ctx = quantize(step, latent, rope)
    assert count == 0
    assert [r.reason for r in ctx.refusals] == ["multiplies the whole cache at every step"]


def batched(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x.expand(4, *x.shape), w)


def einsum(x: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("tk,ekn->etn", x, w)


def transposed(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.transpose(-2, -1).contiguous()


@pytest.mark.parametrize("product", [batched, einsum, transposed])
def test_experts_are_refused(product: Any) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 64, 64))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = product(x, self.up_proj)
            return out

    count, ctx = quantize(Experts(), torch.randn(3, 64))
    assert count == 0
    expected = ("up_proj", "experts are one 3-D parameter: left in 16 bit", False)
    assert only(ctx) == expected


def test_convolutions_are_not_experts() -> None:
    assert quantize(nn.Conv1d(8, 8, 3), torch.randn(1, 8, 9))[1].refusals == []
