"""What the passes that fuse into a quantize_act share: safety of the move, and the exchange."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qoqc.ir.spec import OUTPUT_DTYPES
from qoqc.passes.match import base, example, written
from qoqc.passes.structure.nodes import operation


def alike(*nodes: Node) -> bool:
    """Do these values have one shape, and one dtype that the quantizing ops take?"""
    first, *others = (example(node) for node in nodes)
    if not isinstance(first, torch.Tensor) or first.dtype not in OUTPUT_DTYPES:
        return False
    return all(
        isinstance(x, torch.Tensor) and x.shape == first.shape and x.dtype == first.dtype
        for x in others
    )


def operands(node: Any, name: str) -> tuple[Any, Any] | None:
    """The two operands if the node is the binary operation `name`, else None."""
    if operation(node) != name or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def written_between(graph: Graph, values: Iterable[Node], first: Node, last: Node) -> bool:
    """Does a node from `first` to `last` write one of these values, or what they are views of?"""
    bases = {base(value) for value in values}
    inside = False
    for node in graph.nodes:
        inside |= node is first
        if inside and written(node) in bases:
            return True
        if node is last:
            return False
    return False


def exchange(gm: GraphModule, quantize: Node, fused: Node, inside: Collection[Node]) -> None:
    """Let the readers of `quantize` read `fused`; erase it and what nobody reads of `inside`."""
    for user in list(quantize.users):
        user.replace_input_with(quantize, fused)
    gm.graph.erase_node(quantize)
    for node in reversed(list(gm.graph.nodes)):
        if node in inside and not node.users:
            gm.graph.erase_node(node)
