"""Linears that share an input become one: q, k and v; gate and up."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from qoqc.passes.context import Context
from qoqc.passes.eligible import Site, site
from qoqc.passes.match import LINEAR, base, example, is_call, written


def merge(gm: GraphModule, ctx: Context) -> int:
    """Merge sibling linears that will be quantized.

        q = linear(x, wq);  k = linear(x, wk)
          ->  y = linear(x, cat([wq, wk]));  q, k = split(y)

    The concatenation never runs: the linear pass packs the rows together.
    """
    groups: list[list[tuple[Node, Site]]] = []
    open_groups: dict[tuple[Node, torch.dtype], list[tuple[Node, Site]]] = {}
    for node in gm.graph.nodes:
        target = written(node)
        if target is not None:  # readers behind a write see other values
            open_groups = {k: g for k, g in open_groups.items() if base(k[0]) is not target}
        if not is_call(node, LINEAR):
            continue
        found = site(gm, node, ctx)
        if isinstance(found, Site) and _is_plain(found):
            key = (found.x, found.refs[0].param.dtype)
            if key not in open_groups:
                open_groups[key] = []
                groups.append(open_groups[key])
            open_groups[key].append((node, found))
    return sum(_merge(gm, group) for group in groups if len(group) > 1)


def _is_plain(found: Site) -> bool:
    """May it move up to its first sibling?

    Not with a bias computed in between, and not if the model joined its weight from several itself.
    """
    one = len(found.refs) == 1 and not found.refs[0].eight
    return one and (found.bias is None or found.bias.op == "placeholder")


def _merge(gm: GraphModule, group: list[tuple[Node, Site]]) -> int:
    first, _ = group[0]
    x = first.args[0]
    weights = [node.args[1] for node, _ in group]
    sizes = [s.refs[0].dense().shape[0] for _, s in group]
    with gm.graph.inserting_before(first):
        # a transposed weight is a node of its own and may stand behind the first sibling
        for weight in weights:
            if isinstance(weight, Node) and weight.op != "placeholder":
                first.prepend(weight)
        weight = gm.graph.call_function(torch.cat, (weights,))
        bias = _bias(gm, group, sizes)
        merged = gm.graph.call_function(LINEAR, (x, weight, bias))
        value = example(first)
        merged.meta["example_value"] = value.new_empty((*value.shape[:-1], sum(sizes)))
        parts = gm.graph.call_function(torch.split, (merged, sizes), {"dim": -1})
        parts.meta["example_value"] = tuple(example(node) for node, _ in group)
        for position, (node, _) in enumerate(group):
            part = gm.graph.call_function(operator.getitem, (parts, position))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
    for node, _ in group:
        gm.graph.erase_node(node)
    return len(group)


def _bias(gm: GraphModule, group: list[tuple[Node, Site]], sizes: list[int]) -> Node | None:
    """The concatenated bias, with zeros for siblings that have none."""
    if all(s.bias is None for _, s in group):
        return None
    given = next(s.bias for _, s in group if s.bias is not None)
    pieces = [
        s.bias if s.bias is not None else gm.graph.call_method("new_zeros", (given, size))
        for (_, s), size in zip(group, sizes, strict=True)
    ]
    return gm.graph.call_function(torch.cat, (pieces,))
