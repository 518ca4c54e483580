"""Linears of a graph, and experts: products with a 3-D weight."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from torch.fx import GraphModule, Node

from qoqc.passes.context import Context
from qoqc.passes.match import LINEAR, argument, is_call, is_method, written
from qoqc.passes.structure.facts import LinearRef
from qoqc.passes.structure.nodes import (
    SUMS,
    is_grouped_product,
    is_move,
    operands,
    operation,
    shape,
    uncast,
)


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """A linear in the graph: `node` = `ref` applied to `x`.

    inner: where a sum of its own adds the bias, the other node of product and sum; `node` is the
    one that holds the result.
    """

    node: Node
    x: Node
    ref: LinearRef
    inner: Node | None = None


def linear_sites(gm: GraphModule, ctx: Context) -> tuple[dict[Node, LinearSite], list[str]]:
    """All linears of a normalized graph by node, and what is wrong with the others."""
    sites: dict[Node, LinearSite] = {}
    problems: list[str] = []
    for node in gm.graph.nodes:
        found: LinearSite | str | None = None
        if is_call(node, LINEAR):
            found = _linear(node, ctx)
        elif is_grouped_product(node):
            found = _experts(node, ctx)
        if isinstance(found, LinearSite):
            sites[found.node] = found
        elif found is not None:
            problems.append(found)
    problems += _drop_written(gm, sites)
    uses = Counter(site.ref.weight for site in sites.values())
    problems += [f"{name}: used by {count} linears" for name, count in uses.items() if count > 1]
    return sites, problems


def _linear(node: Node, ctx: Context) -> LinearSite | str:
    x, weight, bias = node.args
    value = uncast(weight)
    transposed = is_method(value, "t")
    if transposed:
        value = uncast(value.args[0])
    name = _parameter(value, ctx)
    if name is None:
        return f"{node.name}: its weight is computed in the graph"
    bias_name = None if bias is None else _parameter(uncast(bias), ctx)
    if bias is not None and bias_name is None:
        return f"{name}: its bias is computed in the graph"
    sizes = shape(value)
    rows, columns = reversed(sizes) if transposed else sizes
    assert isinstance(x, Node)
    ref = LinearRef(name, bias_name, columns, rows, ((0, rows),), transposed)
    return _with_bias(LinearSite(node, x, ref), ctx)


def _experts(node: Node, ctx: Context) -> LinearSite | str:
    """grouped_mm(x, transpose(w)) of w [E, rows, in], or grouped_mm(x, w) of w [E, in, rows]."""
    x, weight = argument(node, 0, "input"), uncast(argument(node, 1, "weight"))
    transposed = True
    if operation(weight) == "transpose" and is_move(weight):
        weight, transposed = uncast(weight.args[0]), False
    name = _parameter(weight, ctx)
    if name is None or len(shape(weight)) != 3:
        return f"{node.name}: its experts are not one 3-D parameter"
    count, rows, columns = shape(weight)
    if transposed:
        rows, columns = columns, rows
    ref = LinearRef(name, None, columns, rows, ((0, rows),), transposed, count)
    return _with_bias(LinearSite(node, x, ref), ctx)


def _with_bias(site: LinearSite, ctx: Context) -> LinearSite:
    """The site with the bias that a sum behind it adds: a parameter, of experts by their number."""
    node, ref = site.node, site.ref
    for user in node.users:
        bias = uncast(operands(user)[1]) if operation(user) in SUMS else None
        if ref.experts and operation(bias) == "getitem":
            bias = uncast(bias.args[0])
        elif ref.experts:
            continue
        name = _parameter(bias, ctx)
        if name is None or ref.bias is not None or shape(bias)[-1:] != (ref.parameter_rows,):
            continue
        biased = dataclasses.replace(ref, bias=name)
        if written(user) is node:
            return LinearSite(node, site.x, biased, user)
        if len(node.users) == 1:
            return LinearSite(user, site.x, biased, node)
    return site


def _drop_written(gm: GraphModule, sites: dict[Node, LinearSite]) -> list[str]:
    """Drop linears whose output is written in place and read again: its node has two values."""
    problems = []
    for node in gm.graph.nodes:
        target = written(node)
        site = sites.get(target)
        if site is not None and node is not site.inner and len(target.users) > 1:
            problems.append(f"{site.ref.weight}: its output is written in place ({node.name})")
            del sites[target]
    return problems


def _parameter(node: Any, ctx: Context) -> str | None:
    is_parameter = isinstance(node, Node) and ctx.parameter(node) is not None
    return ctx.name(node) if is_parameter else None
