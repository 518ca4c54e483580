"""Siblings become one linear; everything that must not move stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qoqc.passes.linear import linear
from qoqc.passes.merge import merge
from qoqc.passes.normalize import normalize
from qoqc.testing import capture, context, run_graph, targets


class Siblings(nn.Module):
    """Three linears of one input, with or without biases."""

    def __init__(self, *biases: bool) -> None:
        super().__init__()
        sizes = (64, 32, 48)
        self.parts = nn.ModuleList(
            nn.Linear(128, n, bias=b) for n, b in zip(sizes, biases, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)


def check(module: nn.Module, count: int, linears: int) -> None:
    x = torch.randn(2, 5, 128)
    gm, inputs = capture(module, x)
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    assert merge(gm, ctx) == count
    assert targets(gm)["linear"] == linears
    for got, expected in zip(run_graph(gm, ctx), module(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_without_biases() -> None:
    check(Siblings(False, False, False), 3, 1)


def test_with_biases() -> None:
    check(Siblings(True, True, True), 3, 1)


def test_missing_biases_count_as_zero() -> None:
    check(Siblings(False, True, False), 3, 1)


def test_transposed_weights() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(128, 64))
            self.second = nn.Parameter(torch.randn(128, 32))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.first, x @ self.second

    check(Conv(), 2, 1)


def test_different_inputs_stay_apart() -> None:
    class Two(Siblings):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part(x + i) for i, part in enumerate(self.parts))

    check(Two(False, False, False), 0, 3)


def test_an_input_written_in_between_stays_apart() -> None:
    class Written(Siblings):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = x.clone()
            first = self.parts[0](x)
            x.mul_(2)
            return first, self.parts[1](x), self.parts[2](x)

    check(Written(False, False, False), 2, 2)


def test_computed_bias_stays_apart() -> None:
    class Computed(Siblings):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            first = self.parts[0](x)
            late = torch.nn.functional.linear(x, self.parts[1].weight, first.sum((0, 1))[:32])
            return first, late, self.parts[2](x)

    check(Computed(False, False, False), 2, 2)


def test_merged_weights_pack_to_the_same_numbers() -> None:
    """Rows are independent, so one bundle of three equals three bundles."""
    module, x = Siblings(True, False, True), torch.randn(2, 5, 128)
    outputs = []
    for merged in (False, True):
        gm, inputs = capture(module, x)
        ctx = context(gm, inputs)
        normalize(gm, ctx)
        if merged:
            merge(gm, ctx)
        assert linear(gm, ctx) == 3
        assert targets(gm)["w4a8_linear"] == (1 if merged else 3)
        outputs.append(run_graph(gm, ctx))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_a_weight_that_the_model_joins_itself_stays_as_it_is() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(64, 128))
            self.b = nn.Parameter(torch.randn(32, 128))
            self.c = nn.Linear(128, 48, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return nn.functional.linear(x, torch.cat([self.a, self.b])), self.c(x)

    check(Joined(), 0, 2)
