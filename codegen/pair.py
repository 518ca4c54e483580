"""Quantizer and linear as one op where the linear alone reads what is quantized."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qoqc.codegen.kernels.few_call import MAX_TOKENS
from qoqc.ir import ops
from qoqc.quant.glu import in_turns

QUANTIZERS = (ops.quantize_act, ops.norm_quant)
LINEARS = (ops.w4a8_linear, ops.w4a8_glu)

MOVABLE = (torch.cat, in_turns, "new_zeros")
"""What the passes put between bias parameters and a linear: they join and sort their values."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A quantizing op and the one linear that reads it."""

    quantizer: Node
    linear: Node


def pair(gm: GraphModule) -> int:
    """Join quantizers with their linears; returns how many.

        q = quantize_act(x);  y = w4a8_linear(*q, weight...)   ->   y = quant_linear(x, weight...)
        q = norm_quant(x, r, ...);  y = w4a8_linear(*q[:3], weight...);  s = q[3]
          ->  p = norm_linear(x, r, ..., weight...);  y = p[0];  s = p[1]

    For GPUs, behind all passes: at run time the op takes one launch for few tokens and the two of
    its parts for more (codegen/dispatch.py). The op stands where the quantizer stood, so that what
    it reads there, written in place later or not, is the same.
    """
    found = pairs(gm.graph)
    for each in found:
        _join(gm.graph, each)
    gm.graph.lint()
    gm.recompile()
    return len(found)


def pairs(graph: Graph) -> list[Pair]:
    """What `pair` joins. Not what reads quantized tokens twice over (quantize_weight8), not
    linears of which several read the same, and nothing where tokens are known to be many."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in QUANTIZERS:
            linear = _only_reader(node)
            if linear is not None and _fits(node, linear):
                found.append(Pair(node, linear))
    return found


def _only_reader(quantizer: Node) -> Node | None:
    """The linear that takes the quantized tokens as they are, if nothing else reads them."""
    readers = {user for part in _parts(quantizer) for user in part.users}
    if len(readers) != 1:
        return None
    (linear,) = readers
    taken = {(part.args[1], place) for part in _parts(quantizer) for place in _places(linear, part)}
    is_linear = linear.op == "call_function" and linear.target in LINEARS
    return linear if is_linear and taken == {(0, 0), (1, 1), (2, 2)} else None


def _parts(quantizer: Node) -> list[Node]:
    """The nodes that take integers, scales or sums out of a quantizer's results."""
    return [user for user in quantizer.users if user.args[1] in (0, 1, 2)]


def _places(linear: Node, part: Node) -> list[int]:
    return [place for place, argument in enumerate(linear.args) if argument is part]


def _fits(quantizer: Node, linear: Node) -> bool:
    """One dtype before and after; tokens few or unknown; weights that are inputs of the graph."""
    before, after = (_example(node) for node in (quantizer.args[0], linear))
    if before is None or after is None or before.dtype != after.dtype:
        return False
    tokens = math.prod(before.shape[:-1])
    if isinstance(tokens, int) and tokens > MAX_TOKENS:
        return False
    return _ahead(linear) is not None


def _example(node: Any) -> torch.Tensor | None:
    """The fake value Dynamo recorded for a node."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _ahead(linear: Node) -> list[Node] | None:
    """What computes the weights and the bias of a linear, in order; None if that is not only
    inputs of the graph, in MOVABLE operations: it may not be there where the quantizer stands."""
    found: list[Node] = []
    queue = [argument for argument in linear.args[3:] if isinstance(argument, Node)]
    while queue:
        node = queue.pop()
        if node.op == "placeholder":
            continue
        if node.target not in MOVABLE:
            return None
        found.append(node)
        queue += node.all_input_nodes
    return sorted(set(found))


def _join(graph: Graph, found: Pair) -> None:
    quantizer, linear = found.quantizer, found.linear
    for node in _ahead(linear) or ():
        if quantizer < node:
            quantizer.prepend(node)
    glu = linear.target is ops.w4a8_glu
    *weight, bias = linear.args[3:8]
    residual = None if glu else linear.args[8]
    rest = (*weight, bias, residual, linear.args[-1], glu)
    normed = quantizer.target is ops.norm_quant
    with graph.inserting_before(quantizer):
        target = ops.norm_linear if normed else ops.quant_linear
        joined = graph.call_function(target, (*quantizer.args, *rest))
        y = graph.call_function(operator.getitem, (joined, 0)) if normed else joined
    y.meta = dict(linear.meta)
    linear.replace_all_uses_with(y)
    graph.erase_node(linear)
    for part in _parts(quantizer):
        graph.erase_node(part)
    for other in list(quantizer.users):  # the residual sum and the norm
        number: Any = other.args[1]
        other.args = (joined, number - 2)
    graph.erase_node(quantizer)
