"""Row numbers go through every move that models make, and through nothing that changes values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qoqc.passes.normalize import normalize
from qoqc.passes.structure.linears import linear_sites
from qoqc.passes.structure.norms import norm_sites
from qoqc.passes.structure.trace import Channels, Tracer
from qoqc.testing import capture, context

Change = Callable[[Tensor], Tensor]
TOKENS, ROWS = 5, 24


class Module(nn.Module):
    """`change` behind a linear; `other` is a second one."""

    def __init__(self, change: Callable[..., Tensor], arguments: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(16, ROWS)
        self.second = nn.Linear(16, ROWS)
        self.weight = nn.Parameter(torch.randn(6))
        self.change = change
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        extra = (self.second(x), self.weight, x.sum(-1, keepdim=True))
        return self.change(self.first(x), *extra[: self.arguments - 1])


def channels(change: Callable[..., Tensor], arguments: int = 1) -> Channels | None:
    """The channels of what `change` returns."""
    gm, inputs = capture(Module(change, arguments), torch.randn(1, TOKENS, 16))
    ctx = context(gm, inputs)
    normalize(gm, ctx)
    linears, _ = linear_sites(gm, ctx)
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    result: Any = output.args[0]
    return Tracer(linears, norm_sites(gm, ctx), {}).channels(result[0])


MOVES: dict[str, Change] = {
    "nothing": lambda y: y.clone(),
    "heads": lambda y: y.view(1, TOKENS, 4, 6).transpose(1, 2),
    "per head chunk": lambda y: y.view(1, TOKENS, 2, 12).transpose(1, 2).chunk(3, dim=-1)[1],
    "split": lambda y: y.split([4, 12, 8], dim=-1)[1],
    "slice": lambda y: y[..., 3:17:2],
    "list": lambda y: y.view(1, TOKENS, 4, 6)[..., [-2], :],
    "unbind": lambda y: y.view(1, TOKENS, 3, 8).unbind(2)[2],
    "repeat_kv": lambda y: (
        y.view(1, TOKENS, 2, 12)[:, :, :, None].expand(1, TOKENS, 2, 3, 12).reshape(1, TOKENS, 72)
    ),
    "joined": lambda y: torch.cat([y[..., 12:], y[..., :12]], dim=-1),
    "stacked": lambda y: torch.stack([y[..., ::2], y[..., 1::2]], dim=-1).flatten(-2),
    "permuted": lambda y: y.view(1, TOKENS, 4, 6).permute(0, 3, 2, 1).contiguous(),
    "turned": lambda y: y.mT,
    "flat tokens": lambda y: y.reshape(-1, ROWS),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    found = channels(MOVES[name])
    assert found is not None
    # the definition: the same moves on a value that holds its own row numbers
    expected = MOVES[name](torch.arange(ROWS).expand(1, TOKENS, ROWS).clone())
    assert torch.equal(found.row, expected)
    assert found.norm is None
    assert bool((found.partner == -1).all())


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 0.5,
        lambda y: -y / 3,
        lambda y: y.double(),
        lambda y: nn.functional.dropout(y, 0.1, training=False),
    ],
)
def test_scaling_and_casts_pass(change: Change) -> None:
    found = channels(change)
    assert found is not None
    assert torch.equal(found.row, torch.arange(ROWS).expand(1, TOKENS, ROWS))


def test_factors_per_token_pass() -> None:
    assert channels(lambda y, other, weight, token: y * token, 4) is not None


CHANGES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "activation": (lambda y: y.relu(), 1),
    "clamp": (lambda y: y.clamp(-1, 1), 1),
    "constant": (lambda y: y + 1, 1),
    "two linears": (lambda y, other: y + other, 2),
    "two linears joined": (lambda y, other: torch.cat([y, other], -1), 2),
    "product of linears": (lambda y, other: y * other, 2),
    "factor per channel": (lambda y, other, weight: y.view(1, TOKENS, 4, 6) * weight, 3),
    "one over": (lambda y: 1 / y, 1),
    "sum with itself": (lambda y: y + y.flip(-1), 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_do_not_pass(name: str) -> None:
    change, arguments = CHANGES[name]
    assert channels(change, arguments) is None


def waves(size: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(TOKENS)[:, None] * torch.arange(1, size + 1)
    return angle.cos(), angle.sin()


def half(y: Tensor) -> Tensor:
    cos, sin = waves(8)
    heads = y.view(1, TOKENS, 3, 8).transpose(1, 2)
    one, two = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-two, one], -1) * sin


def interleaved(y: Tensor) -> Tensor:
    cos, sin = waves(8)
    heads = y.view(1, TOKENS, 3, 8).transpose(1, 2)
    turned = torch.stack([-heads[..., 1::2], heads[..., ::2]], -1).flatten(-2)
    return turned * sin + heads * cos  # either order


def as_two_sums(y: Tensor) -> Tensor:
    cos, sin = waves(4)
    one, two = y.view(1, TOKENS, 3, 8).transpose(1, 2).chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


@pytest.mark.parametrize("rope", [half, interleaved, as_two_sums])
def test_rope_partners(rope: Change) -> None:
    found = channels(rope)
    assert found is not None
    rows = torch.arange(ROWS).view(3, 8)
    number = torch.arange(8)
    partner = number ^ 1 if rope is interleaved else (number + 4) % 8
    assert torch.equal(found.row[0, :, 0], rows)
    assert torch.equal(found.partner[0, :, 0], rows[:, partner])


def test_half_of_rope_is_no_value_of_its_own() -> None:
    cos, _ = waves(ROWS)
    assert channels(lambda y: y * waves(ROWS)[0]) is None
    assert cos.shape == (TOKENS, ROWS)


def test_places_in_a_norm() -> None:
    def norm(y: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        heads = y.view(1, TOKENS, 4, 6)
        scaled = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (weight * scaled).transpose(1, 2)

    found = channels(norm, 3)
    assert found is not None
    assert found.norm is not None
    assert found.norm.ref.weight == "weight"
    assert torch.equal(found.place[0, :, 0], torch.arange(6).expand(4, 6))
    assert torch.equal(found.row[0, :, 0], torch.arange(24).view(4, 6))
