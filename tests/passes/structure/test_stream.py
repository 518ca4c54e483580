"""The residual stream: what counts as reading and writing it, and what nobody can rewrite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qoqc.passes.structure.discover import discover
from qoqc.passes.structure.facts import ModelStructure
from qoqc.testing import capture

WIDTH = 16


class Decoder(nn.Module):
    """Two MLPs on a stream of 16 channels; subclasses do something unusual."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.last = nn.LayerNorm(WIDTH)
        self.up1, self.down1 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.up2, self.down2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.wide = nn.Linear(24, 2 * WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.head = nn.Linear(WIDTH, 50, bias=False)

    def first(self, x: Tensor) -> Any:
        return x + self.down1(self.up1(self.norm1(x)).relu())

    def second(self, x: Tensor) -> Any:
        return x + self.down2(self.up2(self.norm2(x)).relu())

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.last(self.second(self.first(self.table(tokens)))))


def find(module: nn.Module) -> ModelStructure:
    gm, inputs = capture(module, torch.arange(5)[None])
    return discover(gm, inputs)


def test_plain() -> None:
    structure = find(Decoder())
    stream = structure.stream
    assert structure.problems == stream.problems == ()
    assert stream.embeddings == ("table.weight",)
    assert [c.norm.weight for c in stream.consumers if c.norm] == ["norm1.weight", "norm2.weight"]
    assert [p.linear.weight for p in stream.producers] == ["down1.weight", "down2.weight"]
    assert stream.final_norm is not None
    assert (stream.final_norm.weight, stream.head is not None) == ("last.weight", True)
    assert not stream.tied


class PerChannel(Decoder):
    def first(self, x: Tensor) -> Any:
        return x + self.scale * self.down1(self.up1(self.norm1(x)).relu())


class StreamScaled(Decoder):
    def first(self, x: Tensor) -> Any:
        return super().first(x * self.scale)


class OneOver(Decoder):
    def first(self, x: Tensor) -> Any:
        return super().first(1 / x)


class Activation(Decoder):
    def first(self, x: Tensor) -> Any:
        return super().first(x.relu())


class NormRead(Decoder):
    def first(self, x: Tensor) -> Any:
        normed = self.norm1(x)
        return x + self.down1(self.up1(normed).relu()) * normed.tanh().sum(-1, keepdim=True)


class Constant(Decoder):
    def first(self, x: Tensor) -> Any:
        return super().first(x + self.scale)


class InPlace(Decoder):
    def first(self, x: Tensor) -> Any:
        return super().first(x).clamp_(-9, 9)


class Half(Decoder):
    def first(self, x: Tensor) -> Any:
        return x + self.wide(self.up1(self.norm1(x)).relu())[..., :WIDTH]


class Shuffled(Decoder):
    def first(self, x: Tensor) -> Any:
        y = self.down1(self.up1(self.norm1(x)).relu())
        return x + y.view(1, 5, 4, 4).transpose(-1, -2).reshape(1, 5, WIDTH)


class ChannelsMoved(Decoder):
    def first(self, x: Tensor) -> Any:
        return super().first(torch.cat([x[..., 8:], x[..., :8]], -1))


class ComputedWeight(Decoder):
    def first(self, x: Tensor) -> Any:
        up = nn.functional.linear(self.norm1(x), self.up1.weight * 2)
        return x + self.down1(up.relu())


class NoHead(Decoder):
    def forward(self, tokens: Tensor) -> Any:
        return self.second(self.first(self.table(tokens)))


UNUSUAL: dict[type[Decoder], str] = {
    PerChannel: "adds a value that comes from no linear",
    StreamScaled: "(mul) reads the stream",
    OneOver: "(truediv) reads the stream",
    Activation: "(relu) reads the stream",
    NormRead: "(tanh) reads a norm of the stream",
    Constant: "adds a value that comes from no linear",
    InPlace: "(clamp_) writes it in place",
    Half: "adds a value that comes from no linear",
    Shuffled: "adds a value that comes from no linear",
    ChannelsMoved: "reads the stream",
    ComputedWeight: "(linear) reads a norm of the stream",
    NoHead: "no output head reads it",
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_cannot_be_rewritten_is_a_problem(kind: Any) -> None:
    problems = find(kind()).stream.problems
    assert any(UNUSUAL[kind] in problem for problem in problems), problems


class Multiplied(Decoder):
    def first(self, x: Tensor) -> Any:
        return x * 3 + 0.5 * self.down1(self.up1(self.norm1(x)).relu())


class Parallel(Decoder):
    def first(self, x: Tensor) -> Any:
        one = self.down1(self.up1(self.norm1(x)).relu())
        return one + self.down2(self.up2(self.norm2(x)).relu()) + x

    def second(self, x: Tensor) -> Any:
        return x


class Position(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(9, WIDTH)

    def first(self, x: Tensor) -> Any:
        return super().first(x + self.positions(torch.arange(5)))


def test_numbers_commute_with_everything() -> None:
    stream = find(Multiplied()).stream
    assert (stream.problems, stream.multipliers) == ((), (3.0, 0.5))


def test_branches_may_be_added_first() -> None:
    stream = find(Parallel()).stream
    assert stream.problems == ()
    assert {p.linear.weight for p in stream.producers} == {"down1.weight", "down2.weight"}


def test_positions_are_a_table_of_the_stream() -> None:
    stream = find(Position()).stream
    assert (stream.problems, stream.embeddings) == ((), ("table.weight", "positions.weight"))


class Twice(Decoder):
    def second(self, x: Tensor) -> Any:
        return x + self.down1(self.up1(self.norm2(x)).relu())


class ReadElsewhere(Decoder):
    def first(self, x: Tensor) -> Any:
        up = self.up1(self.norm1(x))
        self.seen = up
        return x + self.down1(up.relu())

    def second(self, x: Tensor) -> Any:
        return x + self.down2(self.seen.sigmoid())


def test_shared_weights_belong_to_no_block() -> None:
    structure = find(Twice())
    assert structure.layers[0].mlps == ()
    assert "down1.weight: used by 2 linears" in structure.problems
    assert "down1.weight: a weight of its block is used more than once" in structure.problems


def test_channels_that_something_else_reads_belong_to_no_block() -> None:
    structure = find(ReadElsewhere())
    assert [layer.mlps for layer in structure.layers] == [()]
    assert any("too reads what is computed before it" in p for p in structure.problems)
