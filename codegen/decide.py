"""The value of an expression over bound constexprs, as far as they determine it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import triton.language as tl

UNKNOWN = object()
"""What `evaluate` gives for an expression that depends on anything unbound."""

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of an expression over `values`, or UNKNOWN where it depends on anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return values.get(node.id, UNKNOWN)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "tl":
        return getattr(tl, node.attr, UNKNOWN)
    if isinstance(node, ast.Tuple):
        items = [evaluate(item, values) for item in node.elts]
        return UNKNOWN if any(item is UNKNOWN for item in items) else tuple(items)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        value = evaluate(node.operand, values)
        if value is UNKNOWN:
            return UNKNOWN
        return not value if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.BoolOp):
        return _bool_op(node, values)
    if isinstance(node, ast.Compare):
        return _compare(node, values)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = evaluate(node.left, values), evaluate(node.right, values)
        known = left is not UNKNOWN and right is not UNKNOWN
        return _ARITHMETIC[type(node.op)](left, right) if known else UNKNOWN
    return UNKNOWN


def _bool_op(node: ast.BoolOp, values: Mapping[str, Any]) -> Any:
    """`and` / `or`: one deciding operand is enough, wherever it stands."""
    deciding = isinstance(node.op, ast.Or)
    operands = [evaluate(value, values) for value in node.values]
    if any(v is not UNKNOWN and bool(v) == deciding for v in operands):
        return deciding
    return UNKNOWN if any(v is UNKNOWN for v in operands) else not deciding


def _compare(node: ast.Compare, values: Mapping[str, Any]) -> Any:
    operands = [evaluate(v, values) for v in (node.left, *node.comparators)]
    if any(v is UNKNOWN for v in operands):
        return UNKNOWN
    pairs = zip(node.ops, operands[:-1], operands[1:], strict=True)
    return all(_COMPARE[type(op)](a, b) for op, a, b in pairs)
