"""Norms in a graph: one call of layer_norm or rms_norm, or written out around an rsqrt."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from qoqc.passes.context import Context
from qoqc.passes.match import argument, example
from qoqc.passes.structure.facts import NormRef
from qoqc.passes.structure.nodes import (
    DIFFERENCES,
    PRODUCTS,
    SUMS,
    is_copy,
    operands,
    operation,
    shape,
    uncast,
)

_PURE = frozenset({"pow", "square", "mean", "rsqrt"}) | DIFFERENCES | PRODUCTS | SUMS


@dataclasses.dataclass(frozen=True)
class NormSite:
    """A norm in the graph: reads `source`, makes `output`, computes `inside` on the way."""

    source: Node
    output: Node
    inside: frozenset[Node]
    ref: NormRef


def norm_sites(gm: GraphModule, ctx: Context) -> dict[Node, NormSite]:
    """All norms by their output node."""
    found: dict[Node, NormSite] = {}
    for node in gm.graph.nodes:
        site = None
        if operation(node) in ("layer_norm", "rms_norm"):
            site = _called(node, ctx)
        elif operation(node) == "rsqrt" or _is_inverse_root(node):
            site = _written_out(node, ctx)
        if site is not None:
            found[site.output] = site
    return found


def _called(node: Node, ctx: Context) -> NormSite | None:
    is_layer = operation(node) == "layer_norm"
    weight = argument(node, 2, "weight")
    bias = argument(node, 3, "bias") if is_layer else None
    eps = argument(node, 4 if is_layer else 3, "eps", 1e-5 if is_layer else None)
    source: Any = node.args[0]
    if len(argument(node, 1, "normalized_shape")) != 1:
        return None
    if eps is None:  # torch's default for rms_norm
        eps = torch.finfo(example(source).dtype).eps
    bias_name = _name(ctx, bias)
    found = (None, 0.0, ()) if weight is None else _weight_of(weight, ctx)
    if found is None or (bias is not None and bias_name is None):
        return None
    width = shape(source)[-1]
    kind: Literal["rms", "layer"] = "layer" if is_layer else "rms"
    ref = NormRef(found[0], bias_name, kind, found[1], float(eps), (width,), width)
    return NormSite(source, node, frozenset({node}), ref)


def _is_inverse_root(node: Any) -> bool:
    return operation(node) == "pow" and operands(node)[1] == -0.5


def _written_out(root: Node, ctx: Context) -> NormSite | None:
    """x * rsqrt(mean(x^2) + eps) * w, in any spelling; `x - mean(x)` for x makes it a LayerNorm."""
    variance: Any = root.args[0]
    eps: Any = 0.0
    if operation(variance) in SUMS:
        left, right = operands(variance)
        variance, eps = (left, right) if isinstance(left, Node) else (right, left)
    if operation(variance) != "mean" or not isinstance(eps, float):
        return None
    dim = argument(variance, 1, "dim")
    square: Any = variance.args[0]
    if dim not in (-1, (-1,), [-1]) or operation(square) not in ("pow", "square", *PRODUCTS):
        return None
    if operation(square) == "pow" and operands(square)[1] != 2:
        return None
    if operation(square) in PRODUCTS and operands(square)[0] is not operands(square)[1]:
        return None
    centred: Any = square.args[0]
    source = _centred_source(centred)
    kind: Literal["rms", "layer"] = "rms" if source is None else "layer"
    source = uncast(centred if source is None else source)
    scaled = _times(root, centred)
    if scaled is None or not isinstance(source, Node):
        return None
    return _with_weight(root, scaled, source, kind, eps, ctx)


def _centred_source(node: Any) -> Any:
    """x of `x - mean(x)`, or None."""
    if operation(node) not in DIFFERENCES:
        return None
    x, mean = operands(node)
    return x if operation(mean) == "mean" and mean.args[0] is x else None


def _times(root: Node, centred: Node) -> Node | None:
    """The product of `root` with the value it was computed from."""
    for user in root.users:
        if operation(user) in PRODUCTS:
            left, right = operands(user)
            other = right if left is root else left
            same = _centred_source(other) is not None and (
                _centred_source(other) is _centred_source(centred)
            )
            if same or uncast(other) is uncast(centred):
                return user
    return None


def _with_weight(
    root: Node, scaled: Node, source: Node, kind: Literal["rms", "layer"], eps: float, ctx: Context
) -> NormSite:
    """Walk on from the normalized value through casts, one weight and one bias."""
    weight: str | None = None
    bias: str | None = None
    offset, node = 0.0, scaled
    dims: tuple[int, ...] = (shape(scaled)[-1],)
    path = [scaled]
    while len(node.users) == 1:
        (user,) = node.users
        other = _other(user, node)
        found = _weight_of(other, ctx) if operation(user) in PRODUCTS else None
        if found is not None and weight is None and bias is None:
            weight, offset, dims = found
        elif operation(user) in SUMS and _name(ctx, other) and weight and bias is None:
            bias = _name(ctx, other)
        elif not (is_copy(user) and user.args[0] is node):
            break
        node = user
        path.append(user)
    inside = _between(root, source) | set(path)
    width = shape(scaled)[-1]
    ref = NormRef(weight, bias, kind, offset, eps, dims, width)
    return NormSite(source, node, frozenset(inside), ref)


def _other(user: Node, node: Node) -> Any:
    """The operand beside `node` of a binary operation, or None."""
    if len(user.args) < 2:
        return None
    left, right = operands(user)
    return right if left is node else left


def _weight_of(node: Any, ctx: Context) -> tuple[str, float, tuple[int, ...]] | None:
    """(name, offset, shape) of `w` or `1 + w`."""
    value, offset = uncast(node), 0.0
    if operation(value) in SUMS:
        left, right = operands(value)
        number, value = (left, right) if isinstance(right, Node) else (right, left)
        if not isinstance(number, (int, float)):
            return None
        offset, value = float(number), uncast(value)
    name = _name(ctx, value)
    return None if name is None else (name, offset, shape(value))


def _name(ctx: Context, node: Any) -> str | None:
    value = uncast(node)
    is_parameter = isinstance(value, Node) and ctx.parameter(value) is not None
    return ctx.name(value) if is_parameter else None


def _between(root: Node, source: Node) -> set[Node]:
    """The nodes that compute `root` from `source`."""
    seen: set[Node] = set()
    queue = [root]
    while queue:
        node = queue.pop()
        if node is source or node in seen or not (operation(node) in _PURE or is_copy(node)):
            continue
        seen.add(node)
        queue.extend(node.all_input_nodes)
        # the centring of a LayerNorm may be written twice
        queue.extend(user for user in node.users if _centred_source(user) is not None)
    return seen
