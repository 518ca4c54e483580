"""One spelling per operation, so that the passes behind it match one form each."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from qoqc.passes.context import Context
from qoqc.passes.match import LINEAR, SDPA, argument, example, is_call, is_method
from qoqc.runtime.packed_linear import stored_linear

MATMUL = (operator.matmul, torch.matmul, torch.mm)
SDPA_OPTIONAL = (("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False), ("scale", None))


def normalize(gm: GraphModule, ctx: Context) -> int:
    """Rewrite spellings of linear and SDPA.

    addmm(b, x, w)              ->   linear(x, t(w), b)
    x @ w.T                     ->   linear(x, w, None)
    x @ w                       ->   linear(x, t(w), None)
    stored_linear(x, w, b, ..)  ->   linear(x, w, b)
    sdpa(q, k, v, mask, ...)    ->   sdpa(q, k, v, attn_mask=mask, ...), all keywords
    _set_grad_enabled(...)      ->   (gone: the graph runs under no_grad)
    """
    count = 0
    for node in list(gm.graph.nodes):
        if is_call(node, torch._C._set_grad_enabled):
            gm.graph.erase_node(node)
        elif is_call(node, torch.addmm):
            count += _addmm(gm, ctx, node)
        elif is_call(node, *MATMUL):
            count += _matmul(gm, ctx, node)
        elif is_call(node, stored_linear):
            x, weight, bias, transposed = node.args
            if transposed:
                weight = _transposed(gm, node, weight)
            count += _replace(gm, node, x, weight, bias)
        elif is_call(node, LINEAR, F.linear):
            x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
            bias = argument(node, 2, "bias")
            node.target, node.args, node.kwargs = LINEAR, (x, weight, bias), {}
        elif is_call(node, SDPA, F.scaled_dot_product_attention):
            count += _sdpa(node)
    return count


def _replace(gm: GraphModule, node: Node, x: Any, weight: Any, bias: Any) -> int:
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(LINEAR, (x, weight, bias))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return 1


def _addmm(gm: GraphModule, ctx: Context, node: Node) -> int:
    if node.kwargs or len(node.args) != 3:  # alpha and beta scale the terms: not a linear
        return 0
    bias, x, right = node.args
    weight = _weight(gm, ctx, node, right)
    return 0 if weight is None else _replace(gm, node, x, weight, bias)


def _matmul(gm: GraphModule, ctx: Context, node: Node) -> int:
    x, right = argument(node, 0, "input"), argument(node, 1, "other")
    if node.target is torch.mm:
        right = argument(node, 1, "mat2")
    weight = _weight(gm, ctx, node, right)
    return 0 if weight is None else _replace(gm, node, x, weight, None)


def _weight(gm: GraphModule, ctx: Context, product: Node, right: Any) -> Node | None:
    """The weight of the linear that is `x @ right`: a parameter or t(parameter), else None."""
    if not isinstance(right, Node):
        return None
    original: Any = right.args[0] if _is_transpose(right) else right
    param = ctx.parameter(original)
    if param is None or param.dim() != 2:
        return None
    if isinstance(original, Node) and original is not right:
        return original
    return _transposed(gm, product, right)


def _transposed(gm: GraphModule, product: Node, weight: Node) -> Node:
    with gm.graph.inserting_before(product):
        transposed = gm.graph.call_method("t", (weight,))
    stored = example(weight)
    transposed.meta["example_value"] = None if stored is None else stored.t()
    return transposed


def _is_transpose(node: Node) -> bool:
    if is_call(node, getattr):
        return node.args[1] in ("T", "mT")
    swapped = is_method(node, "transpose") or is_call(node, torch.transpose)
    return is_method(node, "t") or (swapped and set(node.args[1:]) in ({0, 1}, {-1, -2}))


def _sdpa(node: Node) -> int:
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    optional = {
        name: argument(node, position, name, default)
        for position, (name, default) in enumerate(SDPA_OPTIONAL, start=3)
        if name != "scale"
    }
    # scale and enable_gqa are keyword-only in torch's signature
    optional["scale"] = node.kwargs.get("scale")
    optional["enable_gqa"] = node.kwargs.get("enable_gqa", False)
    changed = len(node.args) > 3 or node.target is not SDPA
    node.target, node.args, node.kwargs = SDPA, (q, k, v), optional
    return int(changed)
