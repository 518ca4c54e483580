"""Activation function, product with the other branch, and quantization in one op."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.ir.glue import ActKind
from qoqc.passes.context import Context, Refusal
from qoqc.passes.fusing import alike, exchange, operands, written_between
from qoqc.passes.match import argument, is_call
from qoqc.passes.structure.nodes import operation


def fuse_act(gm: GraphModule, ctx: Context) -> int:
    """Fuse the activations in front of quantized linears; returns how many.

    q = quantize_act(silu(g) * u)   ->   q = act_quant(g, u, "silu")
    q = quantize_act(gelu(g))       ->   q = act_quant(g, None, "gelu")
    """
    count = 0
    for quantize in list(gm.graph.nodes):
        if not is_call(quantize, ops.quantize_act):
            continue
        value = quantize.args[0]
        act, up = _parts(value)
        kind = None if act is None else _kind(act)
        if act is None or kind is None:
            continue
        reason = _fuse(gm, quantize, act, up, kind)
        if reason is None:
            count += 1
        else:
            ctx.unfused.append(Refusal(f"activation {value.name}", reason))
    return count


def _parts(value: Node) -> tuple[Node | None, Node | None]:
    """(activation, other factor) of what is quantized; (None, None) if it is no activation."""
    pair = operands(value, "mul")
    if pair is None:
        return (value, None) if _kind(value) else (None, None)
    left, right = pair
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None, None
    if _kind(left):
        return left, right
    return (right, left) if _kind(right) else (None, None)


def _kind(node: Node) -> ActKind | None:
    """Which activation function the node calls, or None."""
    name = operation(node)
    if name == "silu":
        return "silu"
    if name == "relu":
        return "relu"
    if name == "gelu":
        approximate = argument(node, 1, "approximate", "none")
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    return None


def _fuse(gm: GraphModule, quantize: Node, act: Node, up: Node | None, kind: ActKind) -> str | None:
    """Rewrite; None, or why not."""
    value: Any = quantize.args[0]
    gate: Any = act.args[0]
    inside = {act, value}
    terms = [gate] if up is None else [gate, up]
    if not alike(value, *terms):
        return "its branches differ in shape or dtype"
    if len(value.users) > 1:
        return "it is also read in 16 bit"
    if written_between(gm.graph, {*inside, *terms}, act, quantize):
        return "something on the way is written in place"
    with gm.graph.inserting_before(quantize):
        fused = gm.graph.call_function(ops.act_quant, (gate, up, kind))
    exchange(gm, quantize, fused, inside)
    return None
