"""Attentions written out, and channels of queries, keys and values that something else reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qoqc.passes.structure.discover import discover
from qoqc.passes.structure.facts import AttentionBlock, ModelStructure
from qoqc.testing import capture

WIDTH, HEADS, DIM = 16, 2, 8


class Decoder(nn.Module):
    """One attention on a stream of 16 channels; subclasses write it in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.distance = nn.Parameter(torch.randn(5, DIM))
        self.head = nn.Linear(WIDTH, 50, bias=False)

    def heads(self, y: Tensor) -> Any:
        return y.view(1, 5, HEADS, DIM).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.scaled_dot_product_attention(q, k, v)

    def out(self, a: Tensor) -> Any:
        return self.o(a.transpose(1, 2).reshape(1, 5, WIDTH))

    def forward(self, tokens: Tensor) -> Any:
        x = self.table(tokens)
        y = self.norm(x)
        a = self.attend(*(self.heads(part(y)) for part in (self.q, self.k, self.v)))
        return self.head(self.last(x + self.out(a)))


def find(module: nn.Module) -> ModelStructure:
    gm, inputs = capture(module, torch.arange(5)[None])
    return discover(gm, inputs)


class WrittenOut(Decoder):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        scores = torch.tanh(q @ k.transpose(2, 3) / DIM**0.5 / 30.0) * 30.0
        mask = torch.ones(5, 5).tril().log()
        return F.dropout((scores + mask).softmax(-1), 0.1, False) @ v


class Chosen(Decoder):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        scores = torch.where(torch.ones(5, 5).tril() > 0, q @ k.mT, -1e9)
        return F.softmax(scores, dim=-1) @ v


class Turned(Decoder):
    def out(self, a: Tensor) -> Any:
        return self.o(a.permute(0, 2, 3, 1).reshape(1, 5, WIDTH))  # channels before heads


@pytest.mark.parametrize("kind", [Decoder, WrittenOut, Chosen, Turned])
def test_recognised(kind: Any) -> None:
    structure = find(kind())
    assert structure.problems == ()
    block = structure.layers[0].attention
    assert isinstance(block, AttentionBlock)
    names = [ref.weight for ref in (block.q, block.k, block.v, block.o)]
    assert names == ["q.weight", "k.weight", "v.weight", "o.weight"]
    assert (block.heads, block.kv_of, block.head_dim) == (HEADS, (0, 1), DIM)
    assert block.softcap == (30.0 if kind is WrittenOut else None)
    columns = torch.arange(WIDTH).view(DIM, HEADS).t() if kind is Turned else torch.arange(WIDTH)
    found = [i for start, stop in block.columns for i in range(start, stop)]
    assert found == columns.flatten().tolist()


class RelativePositions(Decoder):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        scores = q @ k.mT + q @ self.distance.relu().t()
        return F.softmax(scores, dim=-1) @ v


class QueryGate(Decoder):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return super().attend(q, k, v) * q.sigmoid()


class KeyIsValue(Decoder):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return super().attend(q, k, k)


class ClampedQuery(Decoder):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return super().attend(q.clamp(-1, 1), k, v)


class NormedOutput(Decoder):
    def out(self, a: Tensor) -> Any:
        y = a.transpose(1, 2).reshape(1, 5, WIDTH)
        return self.o(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


class KeyReturned(Decoder):
    def forward(self, tokens: Tensor) -> Any:
        y = self.norm(self.table(tokens))
        return super().forward(tokens), self.k(y)


class ValueTwice(Decoder):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return super().attend(q, k, v) + v


@pytest.mark.parametrize(
    "kind",
    [RelativePositions, QueryGate, KeyIsValue, ClampedQuery, NormedOutput, KeyReturned, ValueTwice],
)
def test_not_recognised(kind: Any) -> None:
    structure = find(kind())
    assert [layer.attention for layer in structure.layers] == [None] * len(structure.layers)
    assert structure.problems != ()
