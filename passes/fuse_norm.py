"""Residual addition, norm and quantization in one op: a token is read once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.passes.context import Context, Refusal
from qoqc.passes.fusing import alike, exchange, operands, written_between
from qoqc.passes.match import is_call, is_method
from qoqc.passes.norm_chain import Norm, norm_of


def fuse_norm(gm: GraphModule, ctx: Context) -> int:
    """Fuse the norms in front of quantized linears; returns how many.

        s = x + r;  y = norm(s);  q = quantize_act(y)
          ->  q = norm_quant(x, r, ...);  s = q[3];  y = q[4] if anything else reads it

    The op rounds where the graph does (ir/glue.py), so no value changes.
    """
    count = 0
    for quantize in list(gm.graph.nodes):
        if not is_call(quantize, ops.quantize_act):
            continue
        normed = quantize.args[0]
        found = norm_of(normed)
        if isinstance(found, Norm):
            found = _fuse(gm, quantize, normed, found)
        if isinstance(found, str):
            ctx.unfused.append(Refusal(f"norm {normed.name}", found))
        elif found is not None:
            count += 1
    return count


def _fuse(gm: GraphModule, quantize: Node, normed: Node, norm: Norm) -> Norm | str:
    """Rewrite; gives the norm back, or why it stays."""
    place = {node: number for number, node in enumerate(gm.graph.nodes)}
    terms = _terms(norm, place[normed], place)
    inside = norm.inside | {norm.x} if terms else norm.inside
    values = {norm.x, normed, *(terms or ()), *filter(None, (norm.weight, norm.bias))}
    if written_between(gm.graph, values, min(inside, key=place.__getitem__), quantize):
        return "something on the way is written in place"
    x, residual = terms or (norm.x, None)
    others = [user for user in normed.users if user is not quantize]
    with gm.graph.inserting_before(normed.next):
        fused = gm.graph.call_function(
            ops.norm_quant,
            (
                x,
                residual,
                norm.weight,
                norm.bias,
                norm.kind,
                norm.eps,
                norm.offset,
                norm.round_first,
                bool(others),
            ),
        )
        if terms:
            _take_over(gm, norm.x, fused, 3, [u for u in norm.x.users if u not in inside])
        if others:
            _take_over(gm, normed, fused, 4, others)
    exchange(gm, quantize, fused, inside)
    return norm


def _terms(norm: Norm, last: int, place: dict[Node, int]) -> tuple[Node, Node] | None:
    """The two terms of the residual addition in front of the norm, if it can be computed later.

    It cannot where something reads the sum before the norm is done.
    """
    x = norm.x
    pair: Any = operands(x, "add")
    if not (is_call(x, operator.add, torch.add) or is_method(x, "add")) or pair is None:
        return None
    if not all(isinstance(term, Node) for term in pair) or not alike(x, *pair):
        return None
    if any(place[user] < last for user in x.users if user not in norm.inside):
        return None
    return pair[0], pair[1]


def _take_over(gm: GraphModule, old: Node, fused: Node, output: int, users: list[Node]) -> None:
    """Let `users` read an output of the fused op instead of `old`."""
    if not users:
        return
    new = gm.graph.call_function(operator.getitem, (fused, output))
    new.meta = dict(old.meta)
    for user in users:
        user.replace_input_with(old, new)
