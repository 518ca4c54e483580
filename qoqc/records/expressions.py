"""What Dynamo and sympy write as Python text, read without eval: sources and integer formulas."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def resolve(source: str, roots: Mapping[str, Any]) -> Any:
    """The object that a source of Dynamo's names, `L['self']._modules['lm_head'].weight.size()[0]`.

    Attributes, items by constant strings and integers, and `.size()`; L stands for `roots`.
    Raises ValueError for anything else, and for what is not there.
    """
    try:
        return _follow(ast.parse(source, mode="eval").body, roots)
    except (SyntaxError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{source} names nothing: {error}") from error


def _follow(node: ast.expr, roots: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id="L"):
            return roots
        case ast.Attribute(value=value, attr=name):
            return getattr(_follow(value, roots), name)
        case ast.Subscript(value=value, slice=ast.Constant(value=str() | int() as item)):
            return _follow(value, roots)[item]
        case ast.Call(func=ast.Attribute(value=value, attr="size"), args=[], keywords=[]):
            return _follow(value, roots).size()
    raise ValueError(f"{ast.unparse(node)} is no attribute, item or size")


def evaluate(formula: str, symbols: Mapping[str, int]) -> int:
    """The value of a formula of integers and symbols; of a comparison 0 or 1.

    Raises ValueError for what is no such formula, or has a symbol without a value.
    """
    try:
        return int(_value(ast.parse(formula, mode="eval").body, symbols))
    except (SyntaxError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{formula} has no value: {error}") from error


def _value(node: ast.expr, symbols: Mapping[str, int]) -> Any:
    match node:
        case ast.Name(id=name):
            return symbols[name]
        case ast.Constant(value=int() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, symbols)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, symbols), _value(right, symbols))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, symbols), _value(right, symbols))
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(value, symbols) for value in values)
        case ast.BoolOp(op=ast.Or(), values=values):
            return any(_value(value, symbols) for value in values)
    raise ValueError(f"{ast.unparse(node)} is no formula of integers")
