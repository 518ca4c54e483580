"""The terms that a mask joins by `and`, and the mask without some of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.passes.fusing import operands
from qoqc.passes.match import example, is_call, is_copy_of, is_method
from qoqc.passes.never_true import never_true

AND = (operator.and_, torch.logical_and, torch.bitwise_and)

Memo = dict[tuple[Node, frozenset[Node]], Node | None]
"""What is left of a mask without some of its terms: layers share their masks."""


def terms_of(mask: Node) -> Iterator[Node]:
    """What must hold at once where a mask is True."""
    alone = _alone(mask)
    if alone is not None:
        yield from terms_of(alone)
    elif _joins(mask) or _passes_on(mask):
        for part in mask.args[: _inputs(mask)]:
            assert isinstance(part, Node)
            yield from terms_of(part)
    else:
        yield mask


def _alone(node: Node) -> Node | None:
    """The one side of an `or` that may be True at all."""
    sides = operands(node, "or_")
    left = [side for side in sides or () if not never_true(side)]
    return left[0] if sides is not None and len(left) == 1 else None


def _joins(node: Node) -> bool:
    return is_call(node, *AND) and len(node.args) == 2 and all(map(_is_bool, node.args))


def _inputs(node: Node) -> int:
    """How many of its arguments are masks: those of an `and`, else the first."""
    return 2 if _joins(node) else 1


def _passes_on(node: Node) -> bool:
    """Does it give its argument again, or repeat it along axes of size 1 or in front?"""
    in_front = is_method(node, "unsqueeze") and node.args[1:] == (0,)
    return is_method(node, "expand") or is_copy_of(node) or in_front


def _is_bool(node: Any) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def is_true(term: Node) -> bool:
    """Nothing but True, and nobody writes to it?"""
    filled = is_method(term, "new_ones") or is_call(term, torch.ones)
    return filled and _is_bool(term) and all(is_call(user, *AND) for user in term.users)


Question = Callable[[Any], bool]
"""Of a node: are these the positions of the keys, or of the queries?"""


def is_past(term: Node, are_keys: Question, are_queries: Question) -> bool:
    """Is it `keys <= queries`?"""
    key, query = _in_order(term, "le", "ge")
    return are_keys(key) and are_queries(query)


def width_of(term: Node, are_keys: Question, are_queries: Question) -> int:
    """W, if it is `keys > queries - W`; else 0."""
    oldest, key = _in_order(term, "lt", "gt")
    query, width = operands(oldest, "sub") or (None, None)
    if not isinstance(width, int) or width < 1:
        return 0
    return width if are_keys(key) and are_queries(query) else 0


def _in_order(term: Node, upwards: str, downwards: str) -> tuple[Any, Any]:
    """(a, b) of `a < b` or `b > a`; of another node (None, None)."""
    high_first = operands(term, downwards) or (None, None)
    return operands(term, upwards) or (high_first[1], high_first[0])


def without(gm: GraphModule, mask: Node, taken: frozenset[Node], memo: Memo) -> Node | None:
    """A mask without the terms that are taken; None if none is left."""
    if mask in taken:
        return None
    alone = _alone(mask)
    if alone is not None:
        rest = without(gm, alone, taken, memo)
        return None if rest is None else _with_axes(gm, rest, example(mask).dim())
    if not (_joins(mask) or _passes_on(mask)):
        return mask
    if (mask, taken) not in memo:
        inputs = [x for x in mask.args[: _inputs(mask)] if isinstance(x, Node)]
        parts = [without(gm, x, taken, memo) for x in inputs]
        left = [part for part in parts if part is not None]
        others = mask.args[len(parts) :]
        if (*left, *others) == mask.args:
            made: Node | None = mask
        elif len(left) == 1 and len(parts) == 2:
            made = _with_axes(gm, left[0], example(mask).dim())
        else:
            made = _like(gm, mask, *left, *others) if left else None
        memo[mask, taken] = made
    return memo[mask, taken]


def _with_axes(gm: GraphModule, node: Node, dims: int) -> Node:
    """With axes of size 1 in front, up to `dims`."""
    while example(node).dim() < dims:
        with gm.graph.inserting_after(node):
            wider = gm.graph.call_method("unsqueeze", (node, 0))
        wider.meta["example_value"] = example(node).unsqueeze(0)
        node = wider
    return node


def _like(gm: GraphModule, node: Node, *args: Any) -> Node:
    """The same operation on other arguments, right behind it."""
    with gm.graph.inserting_after(node):
        made = gm.graph.create_node(node.op, node.target, args, node.kwargs)
    values = torch.fx.node.map_arg(args, example)
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(torch.Tensor, target)
    made.meta["example_value"] = target(*values, **node.kwargs)
    return made
