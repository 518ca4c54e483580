"""Attentions in a graph: SDPA calls, or products around a softmax."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import GraphModule, Node

from qoqc.passes.match import SDPA, is_call
from qoqc.passes.structure.nodes import (
    DIFFERENCES,
    MATMULS,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
    is_copy,
    is_move,
    operands,
    operation,
)

MAX_STEPS = 400
"""Nodes behind a mask: about 40 in transformers 5."""


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """An attention in the graph: `product` reads q and k, `output` the values.

    k_is_turned if k is [head_dim, tokens], as in q @ k.
    """

    output: Node
    product: Node
    q: Node
    k: Node
    v: Node
    k_is_turned: bool
    mask: Node | None
    softcap: float | None = None


def attention_sites(gm: GraphModule) -> dict[Node, AttentionSite]:
    """All attentions by their output node."""
    found: dict[Node, AttentionSite] = {}
    for node in gm.graph.nodes:
        site = None
        if is_call(node, SDPA):
            q, k, v = node.args
            site = AttentionSite(node, node, q, k, v, False, node.kwargs.get("attn_mask"))
        elif operation(node) == "softmax":
            site = _around(node)
        if site is not None:
            found[site.output] = site
    return found


def _around(softmax: Node) -> AttentionSite | None:
    """softmax(cap(q @ k * scale) + mask) @ v."""
    scores: Any = softmax.args[0]
    mask: Node | None = None
    softcap: float | None = None
    while operation(scores) not in MATMULS:
        name = operation(scores)
        if name in SUMS:
            scores, other = sorted(operands(scores), key=lambda n: not _has_product(n))
            mask = mask or other
        elif name in ("masked_fill", "tanh") or is_copy(scores) or is_move(scores):
            softcap = _cap(scores) if name == "tanh" else softcap
            scores = scores.args[0]
        elif name in PRODUCTS | QUOTIENTS and not isinstance(operands(scores)[1], Node):
            scores = scores.args[0]
        elif name in ("cat", "concat"):  # sinks beside the scores
            scores = scores.args[0][0]
        elif name in DIFFERENCES:  # minus the maximum
            scores = scores.args[0]
        elif name == "where":  # where(allowed, scores, minus infinity)
            mask, scores = mask or scores.args[0], scores.args[1]
        else:
            return None
    q, k = _factors(scores)
    weights = softmax
    while len(weights.users) == 1:
        (user,) = weights.users
        if operation(user) in MATMULS and operands(user)[0] is weights:
            return AttentionSite(user, scores, q, k, operands(user)[1], True, mask, softcap)
        if not (is_copy(user) or is_move(user)):
            return None
        weights = user
    return None


def _factors(product: Node) -> tuple[Any, Any]:
    if operation(product) == "baddbmm":
        named = (product.kwargs.get("batch1"), product.kwargs.get("batch2"))
        return named if None not in named else (product.args[1], product.args[2])
    return operands(product)


def _has_product(node: Any) -> bool:
    """Do scores come this way: is there a product of two activations behind scalings?"""
    while isinstance(node, Node) and operation(node) not in MATMULS:
        scaling = operation(node) in PRODUCTS | QUOTIENTS | {"tanh"}
        if not (scaling or is_copy(node) or is_move(node)) or not node.args:
            return False
        node = node.args[0]
    return isinstance(node, Node)


def _cap(tanh: Node) -> float | None:
    before: Any = tanh.args[0]
    value = operands(before)[1] if operation(before) in QUOTIENTS else None
    return float(value) if isinstance(value, (int, float)) else None


def window(mask: Any) -> int | None:
    """The width of a sliding window: the mask keeps keys `> query - width`."""
    queue = [mask]
    seen: set[Node] = set()
    while queue and len(seen) < MAX_STEPS:
        node = queue.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if operation(node) in ("gt", "ge"):
            bound = operands(node)[1]
            width = operands(bound)[1] if operation(bound) in DIFFERENCES else None
            if isinstance(width, int):
                return width
        queue.extend(node.all_input_nodes)
    return None
