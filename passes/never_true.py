"""Terms of masks that hold nowhere: blocks of tokens where there are none but text."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from qoqc.passes.fusing import operands
from qoqc.passes.match import example, is_call, is_copy_of, is_method, is_slice, written

PAD = torch._C._nn.pad
COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
}


def never_true(node: Any) -> bool:
    """Is a bool tensor False everywhere, whatever is passed?

    groups = pad(full([B, S], -1), (0, T - S), value=-1)
    (groups[b, q] == groups[b, k]) & (groups[b, q] >= 0)
    """
    if not isinstance(node, Node) or not _is_bool(node) or _is_written(node):
        return False
    both = operands(node, "and_")
    if both is not None:
        return any(never_true(part) for part in both)
    both = operands(node, "or_")
    if both is not None:
        return all(never_true(part) for part in both)
    if is_method(node, "expand") or is_copy_of(node):
        return never_true(node.args[0])
    if is_method(node, "new_zeros") or is_call(node, torch.zeros):
        return True
    for name, holds in COMPARED.items():
        left, right = operands(node, name) or (None, None)
        value = _constant(left)
        if value is not None and isinstance(right, (int, float)):
            return not holds(value, right)
    return False


def _constant(node: Any) -> int | float | None:
    """The number that every element of a tensor is, whatever is passed; None if it varies."""
    if not isinstance(node, Node) or _is_written(node):
        return None
    if is_call(node, torch.full) and len(node.args) == 2:
        value = node.args[1]
        return value if isinstance(value, (int, float)) else None
    if is_call(node, PAD) and len(node.args) == 4 and node.args[2] == "constant":
        return value if (value := _constant(node.args[0])) == node.args[3] else None
    if is_slice(node) or is_copy_of(node):
        return _constant(node.args[0])
    return None


def _is_bool(node: Node) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _is_written(node: Node) -> bool:
    return any(written(user) is not None for user in node.users)
