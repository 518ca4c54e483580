"""One quantize_act per value, not per reader."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qoqc.passes.linear import linear
from qoqc.passes.share_quant import share_quant
from qoqc.testing import capture, context, run_graph, targets


class Readers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def shared(module: nn.Module) -> tuple[int, int]:
    """Rewrites made and quantize_acts left; asserts that the outputs stay the same bits."""
    gm, inputs = capture(module, torch.randn(2, 64))
    ctx = context(gm, inputs)
    linear(gm, ctx)
    before = run_graph(gm, ctx)
    count = share_quant(gm, ctx)
    for a, b in zip(before, run_graph(gm, ctx), strict=True):
        assert torch.equal(a, b)
    return count, targets(gm)["quantize_act"]


def test_readers_share() -> None:
    assert shared(Readers()) == (1, 1)


def test_different_values_do_not() -> None:
    class Different(Readers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x + 1), self.second(x)

    assert shared(Different()) == (0, 2)


def test_a_write_in_between_keeps_them_apart() -> None:
    class Written(Readers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 1
            first = self.first(y)
            y.add_(1)
            return first, self.second(y)

    assert shared(Written()) == (0, 2)


def test_a_write_through_a_view_keeps_them_apart() -> None:
    class Written(Readers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 1
            first = self.first(y)
            y[:, 3:] = 0
            return first, self.second(y)

    assert shared(Written()) == (0, 2)


def test_an_augmented_assignment_keeps_them_apart() -> None:
    class Written(Readers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 1
            view = y.view(2, 64)
            first = self.first(y)
            view += 1
            return first, self.second(y)

    assert shared(Written()) == (0, 2)


def test_a_write_elsewhere_does_not_matter() -> None:
    class Elsewhere(Readers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            other = x * 1
            first = self.first(x)
            other.add_(1)
            return first, self.second(x) + other[:, :32]

    assert shared(Elsewhere()) == (1, 1)
