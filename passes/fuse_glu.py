"""SiLU(gate) * up moves into the linear that gate and up are halves of."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from qoqc.passes.context import Context, Refusal
from qoqc.passes.eligible import Site, site
from qoqc.passes.fusing import alike, operands, written_between
from qoqc.passes.match import LINEAR, LINEAR_GLU, argument, example, is_call
from qoqc.passes.structure.nodes import operation
from qoqc.quant.glu import TURN

PARTS = ("split", "chunk")


def fuse_glu(gm: GraphModule, ctx: Context) -> int:
    """Fuse gated SiLU into the linear before it; returns how many.

        gate, up = split(linear(x, w, b));  v = silu(gate) * up   ->   v = linear_glu(x, w, b)

    The GEMM then writes half the bytes and nobody reads the other half. Only linears that will
    be quantized: what is left in 16 bit has no such kernel.
    """
    count = 0
    for product in list(gm.graph.nodes):
        pair = operands(product, "mul")
        if pair is None:
            continue
        act, up = pair if operation(pair[0]) == "silu" else pair[::-1]
        if operation(act) != "silu" or not isinstance(up, Node):
            continue
        linear = _halves_of(act.args[0], up)
        if linear is None or not isinstance(site(gm, linear, ctx), Site):
            continue
        reason = _fuse(gm, product, act, up, linear)
        if reason is None:
            count += 1
        else:
            ctx.unfused.append(Refusal(f"activation {product.name}", reason))
    return count


def _halves_of(gate: Any, up: Node) -> Node | None:
    """The linear that these are the two parts of, in either order, or None."""
    if not is_call(gate, operator.getitem) or not is_call(up, operator.getitem):
        return None
    parts: Any = gate.args[0]
    if up.args[0] is not parts or {gate.args[1], up.args[1]} != {0, 1}:
        return None
    if operation(parts) not in PARTS or not is_call(parts.args[0], LINEAR):
        return None
    linear: Any = parts.args[0]
    value, shape = example(linear), example(gate)
    if not isinstance(value, torch.Tensor) or not isinstance(shape, torch.Tensor):
        return None
    last = argument(cast("Node", parts), 2, "dim", 0) in (-1, value.dim() - 1)
    return cast("Node", linear) if last and 2 * shape.shape[-1] == value.shape[-1] else None


def _fuse(gm: GraphModule, product: Node, act: Node, up: Node, linear: Node) -> str | None:
    """Rewrite; None, or why not."""
    gate: Any = act.args[0]
    parts: Any = gate.args[0]
    if not alike(product, gate, up):
        return "gate and up differ in shape or dtype"
    chain = {linear: {parts}, parts: {gate, up}, gate: {act}, up: {product}, act: {product}}
    if any(set(node.users) - readers for node, readers in chain.items()):
        return "gate or up is also read by others"
    if example(gate).shape[-1] % TURN:
        return f"{example(gate).shape[-1]} channels of the gate are no multiple of {TURN}"
    if written_between(gm.graph, chain, linear, product):
        return "something on the way is written in place"
    x, weight, bias = linear.args
    if gate.args[1] == 1:
        turned = _turned(gm, linear, weight, bias)
        if turned is None:
            return "the up comes first in a weight that the model joined itself"
        weight, bias = turned
    with gm.graph.inserting_before(linear):
        fused = gm.graph.call_function(LINEAR_GLU, (x, weight, bias))
    fused.meta = dict(product.meta)
    product.replace_all_uses_with(fused)
    for node in (product, act, gate, up, parts, linear):
        gm.graph.erase_node(node)
    return None


def _turned(gm: GraphModule, linear: Node, weight: Any, bias: Any) -> tuple[Node, Node] | None:
    """Weight and bias with their halves exchanged, where merge() joined two siblings."""
    joined = is_call(weight, torch.cat) and len(weight.args[0]) == 2
    if not joined or (bias is not None and not is_call(bias, torch.cat)):
        return None
    with gm.graph.inserting_before(linear):
        both = [
            value and gm.graph.call_function(torch.cat, (list(value.args[0])[::-1],))
            for value in (weight, bias)
        ]
    return both[0], both[1]
