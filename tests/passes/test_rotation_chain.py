"""Every spelling of a rotation is read as what ir/rotary.py defines, and nothing else is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from qoqc.ir import rotary
from qoqc.passes.channels import channels, joined
from qoqc.passes.match import example
from qoqc.passes.rotation_chain import Heads, heads_of
from qoqc.testing import capture

BATCH, HEADS, SEQ, DIM = 2, 3, 5, 16
BF16 = torch.bfloat16

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def half(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + half(x) * sin.unsqueeze(1)


def swapped_terms(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(sin[:, None] * half(x), torch.mul(cos[:, None], x))


def in_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x.float() * cos.unsqueeze(1) + half(x).float() * sin.unsqueeze(1)
    return y.to(x.dtype)


def token_major(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    return (x * cos.unsqueeze(2) + half(x) * sin.unsqueeze(2)).permute(0, 2, 1, 3).contiguous()


def chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = (a[..., : DIM // 2].unsqueeze(1) for a in (cos, sin))
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = (a[..., : DIM // 2].repeat_interleave(2, dim=-1).unsqueeze(1) for a in (cos, sin))
    return x * c + pairs(x) * s


def interleaved_written_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = (a[..., : DIM // 2].unsqueeze(1) for a in (cos, sin))
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * c - b * s, a * s + b * c), dim=-1).reshape(x.shape)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., :8], x[..., 8:]
    c, s = (a[..., :8].unsqueeze(1) for a in (cos, sin))
    return torch.cat((turned * c + half(turned) * s, rest), dim=-1)


def partial_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x.split([8, DIM - 8], dim=-1)
    c, s = (a.narrow(-1, 0, 8)[:, None] for a in (cos, sin))
    return torch.cat((turned * c + pairs(turned) * s, rest), dim=-1)


def flat_angles(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[0] + half(x) * sin[0]


SPELLINGS: dict[str, tuple[Function, str, int]] = {
    "plain": (plain, "half", DIM),
    "swapped terms": (swapped_terms, "half", DIM),
    "in fp32": (in_fp32, "half", DIM),
    "token major": (token_major, "half", DIM),
    "chunked": (chunked, "half", DIM),
    "interleaved": (interleaved, "interleaved", DIM),
    "interleaved written out": (interleaved_written_out, "interleaved", DIM),
    "partial": (partial, "half", 8),
    "partial split": (partial_split, "interleaved", 8),
    "angles without batch": (flat_angles, "half", DIM),
}


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B, H, S, D] as a projection gives them, and angles [B, S, D] of the form "half"."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, SEQ, HEADS, DIM, generator=generator).to(dtype).transpose(1, 2)
    angles = torch.randn(BATCH, SEQ, DIM // 2, generator=generator).to(dtype)
    angles = torch.cat((angles, angles), -1)
    return x, angles.cos(), angles.sin()


def read(function: Function, dtype: torch.dtype = torch.float32) -> Heads:
    """What is read off the graph of `function`."""
    gm, _ = capture(function, *tensors(dtype))
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    return heads_of(output.args[0][0])


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_spellings(name: str, dtype: torch.dtype) -> None:
    function, form, width = SPELLINGS[name]
    heads = read(function, dtype)
    turn = heads.turn
    assert turn is not None
    assert heads.apart is None
    assert turn.form == form
    assert example(turn.cos).shape[-1] * (2 if turn.per_pair else 1) == width
    assert example(heads.x).dtype is dtype
    assert heads.x.op == "placeholder" or heads.swapped
    assert all(node.op != "placeholder" for node in heads.inside)
    # the function is what it is read as
    x, cos, sin = tensors(torch.float32)
    batch = 1 if function is flat_angles else BATCH
    cos, sin = (
        (a[..., : DIM // 2].repeat_interleave(2, -1) if name.startswith("interleaved") else a)
        for a in (cos[:batch], sin[:batch])
    )
    defined = rotary.rotate(x, cos[..., :width], sin[..., :width], form)
    torch.testing.assert_close(function(*tensors(torch.float32)), defined, rtol=0, atol=1e-6)


def wrong_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((b, -a), dim=-1) * sin[:, None]


def wrong_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-a, b), dim=-1) * sin[:, None]


def other_input(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, None] + half(x * 2) * sin[:, None]


def mixed_forms(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]


def evens_before_odds(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = (a[..., : DIM // 2].unsqueeze(1) for a in (cos, sin))
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def last_channels(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rest, turned = x[..., :8], x[..., 8:]
    c, s = (a[..., :8].unsqueeze(1) for a in (cos, sin))
    return torch.cat((rest, turned * c + half(turned) * s), dim=-1)


def doubled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    c, s = (angles[..., : DIM // 2].unsqueeze(1) for angles in (cos, sin))
    return torch.cat((a * c - b * s, b * c + b * s), dim=-1)


def by_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = (angles[0, :HEADS, None] for angles in (cos, sin))
    return x * c + half(x) * s


def by_batch_only(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, None, :1] + half(x) * sin[:, None, :1]


def another_dtype(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, None].float() + half(x) * sin[:, None].float()


@pytest.mark.parametrize(
    "function",
    [wrong_sign, wrong_half, other_input, mixed_forms, evens_before_odds, last_channels, doubled],
)
def test_what_is_no_rotation(function: Function) -> None:
    heads = read(function)
    assert heads.turn is None
    assert heads.x is heads.value
    assert heads.inside == frozenset()
    assert heads.apart == "it is computed in front of the cache in no way known"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (by_head, "its angles differ from head to head"),
        (by_batch_only, "its angles are (2, 1, 1, 16) for 5 tokens of 2 sequences"),
        (another_dtype, "torch.bfloat16 goes in and torch.float32 comes out"),
    ],
)
def test_rotations_that_the_op_does_not_know(function: Function, reason: str) -> None:
    heads = read(function, BF16)
    assert heads.turn is None
    assert heads.x is heads.value
    assert heads.apart == reason


@dataclasses.dataclass
class Rms:
    """An RMSNorm over the last axis, as Llama writes it."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


WEIGHT = torch.linspace(0.5, 1.5, DIM).to(BF16)


def normed_after_swap(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plain(Rms(WEIGHT)(x), cos, sin)


def normed_before_swap(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plain(Rms(WEIGHT)(x.transpose(1, 2)).transpose(1, 2), cos, sin)


def normed_only(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return Rms(WEIGHT)(x)


@pytest.mark.parametrize(
    ("function", "swapped", "turned"),
    [
        (normed_after_swap, False, True),
        (normed_before_swap, True, True),
        (normed_only, False, False),
    ],
)
def test_norm_of_each_head(function: Function, swapped: bool, turned: bool) -> None:
    heads = read(function, BF16)
    assert heads.norm is not None
    assert heads.norm.weight is not None
    assert (heads.norm.eps, heads.norm.round_first) == (1e-6, True)
    assert heads.swapped is swapped
    assert (heads.turn is not None) is turned
    assert heads.x is heads.norm.x


def test_norm_can_be_left_in_front() -> None:
    heads = read(normed_after_swap, BF16)
    left = heads_of(heads.value, normed=False)
    assert left.norm is None
    assert left.turn is not None
    assert left.x is not heads.x
    assert heads_of(heads.value, turned=False, normed=False).x is heads.value


def outputs(function: Callable[..., Any], *args: Tensor) -> list[Node]:
    gm, _ = capture(function, *args)
    (output,) = [node for node in gm.graph.nodes if node.op == "output"]
    return list(output.args[0])


def test_channels_of_slices_and_splits() -> None:
    def parts(x: Tensor) -> tuple[Tensor, ...]:
        return (
            x[..., 2:6], x[:, :, ::2], x[..., 1::2], x.narrow(-1, 3, 4), x.chunk(4, -1)[2],
            x.split(5, dim=-1)[1], x.split([3, 7, 10], dim=2)[1], x.tensor_split(2, dim=-1)[1],
            x[:, 1:], x[..., 0], x[:, :2, 1:], x.chunk(2, 0)[0], x.chunk(3, -1)[0],
        )  # fmt: skip

    expected = [
        range(2, 6), range(0, 20, 2), range(1, 20, 2), range(3, 7), range(10, 15),
        range(5, 10), range(3, 10), range(10, 20),
        None, None, None, None, None,
    ]  # fmt: skip
    x = torch.randn(4, 6, 20)
    found = [channels(node) for node in outputs(parts, x)]
    assert [part and part[1] for part in found] == expected


def test_joins() -> None:
    def joins(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.cat((a, b), -1), torch.cat([a, b], dim=1), torch.stack((a, b), -1).flatten(-2),
            torch.stack((a, b), dim=2).view(4, 12), torch.cat((a, b), 0), torch.cat((a, b, a), -1),
            torch.stack((a, b), -1).reshape(8, 6), torch.stack((a, b), 1).flatten(-2),
        )  # fmt: skip

    found = [joined(node) for node in outputs(joins, torch.randn(4, 6), torch.randn(4, 6))]
    forms = [join and join[0] for join in found]
    assert forms == ["half", "half", "interleaved", "interleaved", None, None, None, None]
