"""What queries and keys are made of, read off the graph: input, norm of each head, rotation.

Heads may stand before or behind the tokens, and casts to fp32 and back around each step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from qoqc.passes.match import between, example, is_copy_of, is_heads_swap
from qoqc.passes.norm_chain import Norm, norm_of
from qoqc.passes.structure.nodes import operation
from qoqc.passes.turns import Turn, misfit, turn_of

_ENDS_A_ROTATION = frozenset({"add", "cat", "flatten"})


@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries or keys `value` [B, H, S, D] as `prepare` of ir/rotary.py makes them from `x`.

    swapped    x is [B, S, H, D]
    head_axis  of what the angles are multiplied with: 1 in [B, H, S, R], 2 in [B, S, H, R]
    inside     the nodes that compute the value from x, angles and weight
    apart      why a step in front of `value` was not understood, and stays in front of x
    """

    value: Node
    x: Node
    swapped: bool = False
    norm: Norm | None = None
    turn: Turn | None = None
    head_axis: int = 1
    inside: frozenset[Node] = frozenset()
    apart: str | None = None


def heads_of(value: Node, *, turned: bool = True, normed: bool = True) -> Heads:
    """The steps behind queries or keys `value`; without any, `value` is the input itself.

    turned, normed  look for a rotation, for a norm
    """
    dtype = example(value).dtype
    rotated, head_axis = _outer(value, dtype)
    turn = turn_of(rotated) if turned else None
    if turn is None:
        looks = turned and operation(rotated) in _ENDS_A_ROTATION
        apart = "it is computed in front of the cache in no way known" if looks else None
        return _finish(value, value, False, None, 1, normed, apart)
    reason = misfit(turn, head_axis)
    if reason is not None:
        return _finish(value, value, False, None, 1, normed, reason)
    return _finish(value, turn.x, head_axis == 2, turn, head_axis, normed, None)


def _finish(
    value: Node, x: Node, swapped: bool, turn: Turn | None, head_axis: int, normed: bool,
    apart: str | None,
) -> Heads:  # fmt: skip
    """Look for a norm in front of `x`."""
    norm = None
    if normed:
        x, swapped, norm = _normed(x, swapped)
    if x is not value and example(x).dtype != example(value).dtype:
        reason = f"{example(x).dtype} goes in and {example(value).dtype} comes out"
        return Heads(value, value, apart=reason)
    ends = {x, *((turn.cos, turn.sin) if turn else ()), *((norm.weight,) if norm else ())}
    return Heads(value, x, swapped, norm, turn, head_axis, between(value, ends), apart)


def _outer(node: Any, dtype: torch.dtype) -> tuple[Any, int]:
    """The value behind casts to `dtype`, copies and swaps of heads and tokens; its head axis."""
    head_axis = 1
    while is_heads_swap(node) or is_copy_of(node, dtype):
        head_axis = 3 - head_axis if is_heads_swap(node) else head_axis
        node = node.args[0]
    return node, head_axis


def _normed(x: Node, swapped: bool) -> tuple[Node, bool, Norm | None]:
    """The input of the RMSNorm over each head that gives `x`; `x` itself if there is none."""
    node: Any = x
    here = swapped
    while True:
        found = norm_of(node)
        if isinstance(found, Norm) and found.kind == "rms" and found.weight is not None:
            return found.x, here, found
        if not is_heads_swap(node) and not is_copy_of(node):
            return x, swapped, None
        here ^= is_heads_swap(node)
        node = node.args[0]
