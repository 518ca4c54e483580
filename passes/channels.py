"""Where the channels of a head go: a slice of them, and two slices joined again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from qoqc.ir.rotary import RotaryForm
from qoqc.passes.match import argument, example, is_slice
from qoqc.passes.structure.nodes import operation

_JOINS = frozenset({"cat", "concat", "concatenate"})
_FLAT = frozenset({"flatten", "reshape", "view", "reshape_as", "view_as"})


def channels(node: Any) -> tuple[Node, range] | None:
    """(x, positions) if the node is nothing but these channels of x, in this order."""
    if is_slice(node):
        return _sliced(node)
    name = operation(node)
    if name == "narrow":
        dim, start, length = (argument(node, i, n) for i, n in enumerate(_NARROW, start=1))
        x = node.args[0]
        return (x, range(start, start + length)) if _is_last(x, dim) else None
    if name == "getitem" and isinstance(node.args[1], int):
        return _part(node.args[0], node.args[1])
    return None


_NARROW = ("dim", "start", "length")


def _sliced(node: Node) -> tuple[Node, range] | None:
    x, index = node.args
    value = example(x)
    if not isinstance(x, Node) or not isinstance(index, tuple) or not index:
        return None
    *others, last = index
    whole = all(part is Ellipsis or part == slice(None) for part in others)
    reaches_last = Ellipsis in others or len(index) == value.dim()
    if not whole or not reaches_last or not isinstance(last, slice):
        return None
    limits = (last.start, last.stop, last.step, value.shape[-1])
    if not all(limit is None or isinstance(limit, int) for limit in limits):
        return None  # a node or a symbolic size
    return x, range(*last.indices(value.shape[-1]))


def _part(parts: Any, number: int) -> tuple[Node, range] | None:
    """Output `number` of a split along the channels."""
    name = operation(parts)
    if name not in ("chunk", "tensor_split", "split") or not parts.args:
        return None
    x = parts.args[0]
    if not _is_last(x, argument(parts, 2, "dim", 0)):
        return None
    width = example(x).shape[-1]
    how = argument(parts, 1, "split_size_or_sections" if name == "split" else "chunks")
    sizes: Sequence[int]
    if isinstance(how, (list, tuple)) and name == "split":
        sizes = how
    elif isinstance(how, int) and width % how == 0:
        size = how if name == "split" else width // how
        sizes = [size] * (width // size)
    else:
        return None
    if not all(isinstance(size, int) for size in sizes):
        return None
    number %= len(sizes)
    start = sum(sizes[:number])
    return x, range(start, start + sizes[number])


def _is_last(x: Any, dim: Any) -> bool:
    """Is `dim` the last axis of x, of a size known now?"""
    value = example(x)
    known = isinstance(value, torch.Tensor) and isinstance(value.shape[-1], int)
    return known and dim in (-1, value.dim() - 1)


def joined(node: Any) -> tuple[RotaryForm, Node, Node] | None:
    """(form, first, second) of two tensors joined along the channels.

    half         cat((first, second), -1)
    interleaved  stack((first, second), -1).flatten(-2), channel by channel in turn
    """
    name = operation(node)
    if name in _JOINS:
        pair = _pair(node)
        dims = (-1, example(node).dim() - 1)
        if pair is not None and argument(node, 1, "dim", 0) in dims:
            return "half", *pair
    if name in _FLAT and operation(node.args[0]) == "stack":
        stack: Any = node.args[0]
        pair = _pair(stack)
        if pair is None or argument(stack, 1, "dim", 0) not in (-1, example(stack).dim() - 1):
            return None
        *outer, width = example(pair[0]).shape
        if tuple(example(node).shape) == (*outer, 2 * width):
            return "interleaved", *pair
    return None


def _pair(node: Node) -> tuple[Node, Node] | None:
    parts = argument(node, 0, "tensors", ())
    both = isinstance(parts, (list, tuple)) and len(parts) == 2
    if not both or not all(isinstance(part, Node) for part in parts):
        return None
    return parts[0], parts[1]


def half_of(positions: range, width: int) -> tuple[RotaryForm, int] | None:
    """(form, 0 or 1) if these are the first or second channels of the pairs of a rotation."""
    if positions in (range(width // 2), range(width // 2, width)):
        return "half", int(positions.start > 0)
    if positions in (range(0, width, 2), range(1, width, 2)):
        return "interleaved", positions.start
    return None
