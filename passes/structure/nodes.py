"""Kinds of graph nodes by what they do to values, beyond passes/match.py."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import Node

from qoqc.passes.match import example

COPIES = frozenset(
    {"contiguous", "clone", "to", "type_as", "float", "double", "half", "bfloat16", "type"}
    | {"dropout", "detach", "dropout_"}
)
"""The same values, perhaps in another dtype; dropout because the graph is one of inference."""

MOVES = frozenset(
    {"view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "unflatten"}
    | {"expand", "broadcast_to", "repeat", "repeat_interleave", "tensor_split"}
    | {"chunk", "split", "unbind"}
    | {"narrow", "select", "swapaxes", "swapdims", "movedim", "t", "getitem", "getattr"}
)
"""Values move, repeat or go missing, and do not change."""

SUMS = frozenset({"add", "iadd", "add_", "__add__"})
DIFFERENCES = frozenset({"sub", "isub", "sub_"})
PRODUCTS = frozenset({"mul", "imul", "mul_"})
QUOTIENTS = frozenset({"truediv", "div", "itruediv", "div_"})
ELEMENTWISE = (
    SUMS
    | DIFFERENCES
    | PRODUCTS
    | QUOTIENTS
    | {"pow", "square", "exp", "tanh", "sigmoid", "erf", "sqrt", "neg", "abs", "clamp", "clip"}
    | {"relu", "relu_", "relu6", "gelu", "silu", "silu_", "softplus", "mish", "hardswish"}
    | {"leaky_relu", "elu", "selu", "logsigmoid", "maximum", "minimum"}
)
"""Operations an activation may be written with."""

ASKS_SHAPE = frozenset({"size", "zeros_like", "empty_like", "new_zeros", "new_empty", "new_ones"})
"""These look at a tensor's shape, not at its values."""

MATMULS = frozenset({"matmul", "bmm", "baddbmm", "mm"})

_GROUPED = re.compile(r"grouped_mm")
_VIEW_ATTRIBUTES = frozenset({"T", "mT"})


def operation(node: Any) -> str:
    """The short name of what a node calls: `view`, `softmax`, `grouped_mm`; "" if nothing."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return ""
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")


def is_copy(node: Any) -> bool:
    """Does this node only copy or cast its first argument?"""
    return operation(node) in COPIES


def is_move(node: Any) -> bool:
    """Does this node only move, slice or repeat values of its first argument?"""
    name = operation(node)
    return name in MOVES and (name != "getattr" or node.args[1] in _VIEW_ATTRIBUTES)


def is_grouped_product(node: Any) -> bool:
    """Is this the product of sorted tokens with the 3-D weight of their experts?"""
    return _GROUPED.search(operation(node)) is not None


def uncast(node: Any) -> Any:
    """The value behind copies and casts."""
    while is_copy(node) and node.args:
        node = node.args[0]
    return node


def shape(node: Any) -> tuple[int, ...]:
    """The shape of a node's value; () for what is not a tensor."""
    value = example(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_uniform(factor: Any) -> bool:
    """Is this factor the same for all channels of a token: a number, or a last dimension of 1?"""
    if not isinstance(factor, Node):
        return isinstance(factor, (int, float))
    value = example(factor)
    return isinstance(value, torch.Tensor) and (value.dim() == 0 or value.shape[-1] == 1)


def operands(node: Any) -> tuple[Any, Any]:
    """The two operands of a binary operation."""
    left = node.args[0] if node.args else node.kwargs.get("input")
    right = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    return left, right
