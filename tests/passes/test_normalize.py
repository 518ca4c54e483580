"""Each spelling of a linear and of SDPA becomes one form with the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qoqc.passes.match import LINEAR, SDPA
from qoqc.passes.normalize import normalize
from qoqc.testing import capture, context, run_graph, targets

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


class Product(nn.Module):
    """Applies `spelling` to x, a weight [K, N] or [N, K], and a bias [N]."""

    def __init__(self, spelling: Spelling, *shape: int) -> None:
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self.weight, self.bias)


ROWS: dict[str, Spelling] = {  # weight [N, K]
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear keywords": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "x @ w.T": lambda x, w, b: x @ w.T,
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "matmul transpose": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)),
    "mm mT": lambda x, w, b: torch.mm(x, w.mT),
    "addmm w.t()": lambda x, w, b: torch.addmm(b, x, w.t()),
}
COLUMNS: dict[str, Spelling] = {  # weight [K, N]
    "x @ w": lambda x, w, b: x @ w,
    "matmul": lambda x, w, b: torch.matmul(x, w),
    "matmul keywords": lambda x, w, b: torch.matmul(input=x, other=w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
}


@pytest.mark.parametrize(
    ("spelling", "shape"),
    [pytest.param(f, (48, 64), id=n) for n, f in ROWS.items()]
    + [pytest.param(f, (64, 48), id=n) for n, f in COLUMNS.items()],
)
def test_linear_spellings(spelling: Spelling, shape: tuple[int, int]) -> None:
    module, x = Product(spelling, *shape), torch.randn(5, 64)
    gm, inputs = capture(module, x)
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    (node,) = [n for n in gm.graph.nodes if n.target is LINEAR]
    assert len(node.args) == 3
    assert not node.kwargs
    torch.testing.assert_close(run_graph(gm, ctx)[0], module(x))


LEFT_ALONE: dict[str, Spelling] = {
    "scaled addmm": lambda x, w, b: torch.addmm(b, x, w, beta=0.5),
    "weight on the left": lambda x, w, b: w @ x.T,
    "computed weight": lambda x, w, b: x @ (w * 2),
    "activations": lambda x, w, b: x @ x.T,
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    shape = (48, 64) if name == "weight on the left" else (64, 48)
    module, x = Product(LEFT_ALONE[name], *shape), torch.randn(5, 64)
    gm, inputs = capture(module, x)
    ctx = context(gm, inputs)
    before = targets(gm)
    assert normalize(gm, ctx) == 0
    assert targets(gm) == before
    torch.testing.assert_close(run_graph(gm, ctx)[0], module(x))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"scale": 0.5, "enable_gqa": True},
        {"attn_mask": torch.ones(4, 4).tril().bool(), "dropout_p": 0.0},
    ],
)
def test_sdpa_arguments_become_keywords(arguments: dict[str, Any]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **arguments)

    args = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    gm, inputs = capture(attend, *args)
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    (node,) = [n for n in gm.graph.nodes if n.target is SDPA]
    assert len(node.args) == 3
    assert node.kwargs.keys() == {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    torch.testing.assert_close(run_graph(gm, ctx)[0], attend(*args))


def test_sdpa_positional_mask() -> None:
    mask = torch.ones(4, 4).tril().bool()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, False)

    args = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    gm, inputs = capture(attend, *args)
    ctx = context(gm, inputs)
    assert normalize(gm, ctx) == 1
    torch.testing.assert_close(run_graph(gm, ctx)[0], attend(*args))


def test_grad_switches_go() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        with torch.enable_grad():
            return y + 1

    gm, inputs = capture(f, torch.ones(3))
    assert targets(gm)["_set_grad_enabled"] > 0
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    assert targets(gm)["_set_grad_enabled"] == 0
    assert run_graph(gm, ctx)[0].tolist() == [3.0, 3.0, 3.0]
