"""Small questions about nodes, asked by every pass."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Node

from qoqc.ir import glue

LINEAR = torch._C._nn.linear
LINEAR_GLU = glue.linear_glu
SDPA = torch._C._nn.scaled_dot_product_attention

VIEW_METHODS = frozenset(
    {"view", "reshape", "contiguous", "expand", "transpose", "permute", "unsqueeze", "squeeze"}
    | {"flatten", "unflatten", "repeat_interleave", "clone", "to", "type_as", "view_as"}
)
VIEW_FUNCTIONS = frozenset(
    {torch.reshape, torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze, torch.flatten}
)
WRITES = frozenset(
    {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}
    | {operator.iand, operator.ior, operator.ixor}
)
KEYWORDS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
"""Functions whose names end as those of in-place methods do."""


def is_call(node: Any, *targets: Any) -> bool:
    """Is this a call of one of these functions?"""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_method(node: Any, *names: str) -> bool:
    """Is this a call of one of these tensor methods?"""
    return isinstance(node, Node) and node.op == "call_method" and node.target in names


def is_slice(node: Any) -> bool:
    """Is this `x[..., a:b]` or the like: indexing of a tensor, not of a tuple of results?"""
    return is_call(node, operator.getitem) and isinstance(example(node.args[0]), torch.Tensor)


def is_view(node: Any) -> bool:
    """Does this node only move, slice, repeat or copy values of its first argument?"""
    return is_method(node, *VIEW_METHODS) or is_call(node, *VIEW_FUNCTIONS) or is_slice(node)


def source(node: Any) -> Any:
    """The producer of a value, walking back through shape-only nodes."""
    while is_view(node):
        node = node.args[0]
    return node


def written(node: Node) -> Any:
    """The `base` of the tensor that this node writes in place, or None if it writes none."""
    return base(node.args[0]) if _is_write(node) else None


def base(node: Any) -> Any:
    """The producer of the storage of a value, as far as views and in-place operations show it."""
    while is_view(node) or _is_write(node):
        node = node.args[0]
    return node


def _is_write(node: Any) -> bool:
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and node.target not in KEYWORDS
    if node.op == "call_function":
        in_place |= node.target in WRITES or node.kwargs.get("inplace") is True
    return in_place and bool(node.args)


def between(node: Node, ends: Collection[Any]) -> frozenset[Node]:
    """The nodes that compute `node` from `ends`, itself among them."""
    seen: set[Node] = set()
    queue = [node]
    while queue:
        here = queue.pop()
        if here not in ends and here not in seen:
            seen.add(here)
            queue.extend(here.all_input_nodes)
    return frozenset(seen)


def is_heads_swap(node: Any) -> bool:
    """Does this node exchange axes 1 and 2 of a tensor of four: [B, H, S, D] and [B, S, H, D]?"""
    if not isinstance(node, Node) or not node.args or node.kwargs:
        return False
    value = example(node.args[0])
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return False
    axes = node.args[1] if isinstance(node.args[1:2], tuple) and len(node.args) == 2 else None
    order = tuple(axes) if isinstance(axes, (tuple, list)) else node.args[1:]
    if is_method(node, "permute") or is_call(node, torch.permute):
        return order == (0, 2, 1, 3)
    swaps = is_method(node, *_SWAPS) or is_call(node, torch.transpose, torch.swapaxes)
    return swaps and {dim % 4 for dim in order if isinstance(dim, int)} == {1, 2}


_SWAPS = ("transpose", "swapaxes", "swapdims")


def is_copy_of(node: Any, *dtypes: torch.dtype) -> bool:
    """Does this node give its first argument again, in the same shape and order?

    In the same dtype, in fp32 what was 16 bit, or in one of `dtypes` what was fp32.
    """
    # not through other views of the same shape: transpose(2, 3) of equal sizes
    if not is_method(node, *CASTS, "contiguous", "clone", "view", "reshape"):
        return False
    before, after = example(node.args[0]), example(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.device != after.device or tuple(before.shape) != tuple(after.shape):
        return False
    if before.dtype == after.dtype:
        return True
    widened = before.dtype in (torch.bfloat16, torch.float16) and after.dtype == torch.float32
    rounded = before.dtype == torch.float32 and after.dtype in dtypes
    return is_method(node, *CASTS) and (widened or rounded)


CASTS = ("to", "type_as", "type", "float", "bfloat16", "half")


def example(node: Any) -> Any:
    """The fake value Dynamo recorded for a node, or None."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
