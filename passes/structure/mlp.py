"""MLPs: the linears before a linear that writes to the stream, and the activation in between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from qoqc.passes.structure.facts import (
    LinearRef,
    MlpBlock,
    NormRef,
    are_disjoint,
    runs_of,
)
from qoqc.passes.structure.linears import LinearSite
from qoqc.passes.structure.nodes import (
    ELEMENTWISE,
    PRODUCTS,
    is_copy,
    is_move,
    operands,
    operation,
)
from qoqc.passes.structure.trace import Channels, Tracer

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""By these names activations are known, however a graph writes them."""

TOLERANCE = 1e-6
"""Models write gelu_tanh with sqrt(2/pi) to 8 digits; different activations differ by over 1e-4."""

HOMOGENEOUS = {"identity": 1, "relu": 1, "relu2": 2}
"""act(c * x) = c ** degree * act(x) for c > 0."""

MAX_STEPS = 40
"""Nodes of one written-out activation: gelu with tanh has 8."""


def mlp_block(
    down: LinearSite,
    tracer: Tracer,
    linears: dict[Node, LinearSite],
    norm: NormRef | None,
    post_norm: NormRef | None,
    router: LinearRef | None,
) -> MlpBlock | str:
    """The facts of the MLP that ends in `down`, or why they cannot be told."""
    body = _unmoved(down.x)
    gate: Channels | None = None
    up = _columns(tracer.channels(body), linears)
    if up is not None:
        activation: str | None = "identity"
    elif operation(body) in PRODUCTS and (found := _gated(body, tracer, linears)) is not None:
        up, gate, activation = found
    else:
        up, activation = _activated(body, tracer, linears)
    if up is None:
        return f"{down.ref.weight}: its input is not one activation of linears, or two multiplied"
    if activation is None:
        return f"{down.ref.weight}: the activation before it is none of {', '.join(ACTIVATIONS)}"
    up_ref = _ref(up, linears[up.origin].ref)
    gate_ref = None if gate is None else _ref(gate, linears[gate.origin].ref)
    refs = [up_ref] if gate_ref is None else [up_ref, gate_ref]
    one_by_one = all(ref.out_features == down.ref.in_features for ref in refs)
    if not one_by_one or not are_disjoint(refs):
        return f"{down.ref.weight}: does not read the channels before it one by one"
    return MlpBlock(
        gate=gate_ref,
        up=up_ref,
        down=down.ref,
        activation=activation,
        norm=norm,
        post_norm=post_norm,
        router=router if down.ref.experts else None,
    )


def _unmoved(node: Any) -> Any:
    """Behind casts, and views that keep the order of channels: `view(-1, intermediate)`."""
    while is_copy(node) or operation(node) in ("view", "reshape"):
        node = node.args[0]
    return node


def _columns(channels: Channels | None, linears: dict[Node, LinearSite]) -> Channels | None:
    """Only channels of a linear, untouched by norms and RoPE."""
    if channels is None or channels.origin not in linears or channels.norm is not None:
        return None
    return None if bool((channels.partner >= 0).any()) else channels


def _gated(
    body: Node, tracer: Tracer, linears: dict[Node, LinearSite]
) -> tuple[Channels, Channels, str | None] | None:
    """(up, gate, activation) of up * activation(gate)."""
    for up_node, gate_node in (operands(body), operands(body)[::-1]):
        up = _columns(tracer.channels(up_node), linears)
        gate, activation = _activated(gate_node, tracer, linears)
        other = gate is not None and up is not None and not _same(gate, up)
        if up is not None and gate is not None and other:
            return up, gate, activation
    return None


def _same(one: Channels, other: Channels) -> bool:
    return one.origin is other.origin and torch.equal(one.row, other.row)


def _activated(
    node: Any, tracer: Tracer, linears: dict[Node, LinearSite]
) -> tuple[Channels | None, str | None]:
    """(x, name) of activation(x); name is None if it is not a known one."""
    leaves: dict[Node, Channels] = {}
    queue = [node]
    seen: set[Node] = set()
    while queue and len(seen) < MAX_STEPS:
        current = queue.pop()
        if not isinstance(current, Node) or current in seen:
            continue
        seen.add(current)
        found = _columns(tracer.channels(current), linears)
        if found is not None and _is_unscaled(current, found):
            leaves[current] = found
        elif is_copy(current) or (operation(current) in ELEMENTWISE and current.all_input_nodes):
            queue.extend(current.all_input_nodes)
        else:
            return None, None  # computed from something else too, or moved
    x = next(iter(leaves.values()), None)
    if queue or x is None or not all(_same(x, leaf) for leaf in leaves.values()):
        return None, None
    return x, _name(node, set(leaves))


def _is_unscaled(node: Any, channels: Channels) -> bool:
    """Are these the linear's values as they are?"""
    while is_copy(node) or is_move(node):
        node = node.args[0]
    return node is channels.origin


def _name(node: Node, leaves: set[Node]) -> str | None:
    """The activation that a graph's expression equals on a range of numbers."""
    x = torch.linspace(-8, 8, 257, dtype=torch.float64)
    y = _evaluate(node, leaves, x)
    for name, activation in ACTIVATIONS.items():
        if bool((y.double() - activation(x)).abs().max() < TOLERANCE):
            return name
    return None


def _evaluate(node: Node, leaves: set[Node], x: Tensor) -> Tensor:
    """An elementwise expression with a copy of `x` for every leaf."""
    memo: dict[Node, Any] = {leaf: x.clone() for leaf in leaves}

    def value(n: Any) -> Any:
        if n not in memo:
            if is_copy(n):
                memo[n] = value(n.args[0])
            else:
                args, kwargs = map_arg((n.args, n.kwargs), value)
                method = n.op == "call_method"
                target: Any = getattr(torch.Tensor, str(n.target)) if method else n.target
                memo[n] = target(*args, **kwargs)
        return memo[n]

    found: Tensor = value(node)
    return found


def _ref(channels: Channels, whole: LinearRef) -> LinearRef:
    row = channels.row.reshape(-1, channels.row.shape[-1])[0]
    return dataclasses.replace(whole, rows=runs_of(row.tolist()))
