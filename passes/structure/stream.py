"""The residual stream: a walk over the graph that follows what is added to what."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.fx import Node

from qoqc.passes.context import Context
from qoqc.passes.match import argument, written
from qoqc.passes.structure.linears import LinearSite
from qoqc.passes.structure.nodes import (
    ASKS_SHAPE,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
    is_copy,
    is_move,
    is_uniform,
    operands,
    operation,
    shape,
    uncast,
)
from qoqc.passes.structure.norms import NormSite


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """One value of the residual stream; a new one after every sum."""


@dataclasses.dataclass(frozen=True)
class Normed:
    """A state after a norm."""

    state: State
    site: NormSite


@dataclasses.dataclass(frozen=True)
class Branch:
    """A sum of linears' outputs on its way to the stream."""

    linears: tuple[Node, ...]
    post_norm: NormSite | None = None
    multiplier: float = 1.0


@dataclasses.dataclass(frozen=True)
class Reader:
    """A linear that reads `state`, through `norm` if there is one."""

    linear: LinearSite
    state: State
    norm: NormSite | None


class StreamWalk:
    """Visits the nodes in order. Afterwards:

    tables, readers, writers (linear node -> post-norm), stream_norms, multipliers, problems;
    `last` is the state that the last norm read.
    """

    def __init__(
        self, linears: dict[Node, LinearSite], norms: dict[Node, NormSite], ctx: Context
    ) -> None:
        """Walk later; `linears` and `norms` are those of the graph."""
        self.tables: dict[str, None] = {}
        self.readers: list[Reader] = []
        self.writers: dict[Node, NormSite | None] = {}
        self.stream_norms: list[NormSite] = []
        self.multipliers: list[float] = []
        self.problems: list[str] = []
        self.width = 0
        self._linears = linears
        self._norms = norms
        self._ctx = ctx
        self._inside = {n for site in norms.values() for n in site.inside} - norms.keys()
        self._inside |= {site.inner for site in linears.values() if site.inner is not None}
        self._kinds: dict[Node, Any] = {}

    def visit(self, node: Node) -> None:
        """Find out what `node` is to the stream."""
        if node in self._inside or node.op == "placeholder":
            return
        if isinstance(self.of(written(node)), (State, Normed)):
            self.problems.append(f"{node.name} ({operation(node)}) writes it in place")
        kind = self._kind(node)
        if kind is not None:
            self._kinds[node] = kind

    def of(self, node: Any) -> Any:
        """The State, Normed or Branch that a node is, or None."""
        return self._kinds.get(node) if isinstance(node, Node) else None

    def _kind(self, node: Node) -> Any:
        name = operation(node)
        if name == "embedding":
            return self._table(node)
        if node in self._norms:
            return self._normed(self._norms[node])
        if node in self._linears:
            return self._linear(self._linears[node])
        first = self.of(node.args[0]) if node.args else None
        if is_copy(node):
            return first
        if is_move(node) or name in ("sum", "index_add_", "index_add"):
            return self._moved(node, first)
        if name in PRODUCTS | QUOTIENTS:
            return self._scaled(node)
        if name in SUMS:
            return self._sum(node)
        self._other(node)
        return None

    def _table(self, node: Node) -> State | None:
        weight = uncast(argument(node, 1, "weight"))
        if self._ctx.parameter(weight) is None:
            return None
        self.tables[self._ctx.name(weight)] = None
        self.width = shape(node)[-1]
        return State()

    def _normed(self, site: NormSite) -> Any:
        before = self.of(site.source)
        if isinstance(before, Normed):  # a norm of a norm: the first one is part of the stream
            return Normed(self._state_of(before), site)
        if isinstance(before, State):
            return Normed(before, site)
        if isinstance(before, Branch) and before.post_norm is None:
            return dataclasses.replace(before, post_norm=site)
        return None

    def _linear(self, site: LinearSite) -> Branch:
        before = self.of(site.x)
        if isinstance(before, State):
            self.readers.append(Reader(site, before, None))
        elif isinstance(before, Normed):
            self.readers.append(Reader(site, before.state, before.site))
        return Branch((site.node,))

    def _moved(self, node: Node, first: Any) -> Any:
        """Tokens may move; a branch or state whose channels move is none any more."""
        if first is None or shape(node)[-1:] == shape(node.args[0])[-1:] == (self.width,):
            return first
        self._other(node)
        return None

    def _scaled(self, node: Node) -> Any:
        left, right = operands(node)
        kinds = self.of(left), self.of(right)
        kind, factor = (kinds[0], right) if kinds[0] is not None else (kinds[1], left)
        if kind is None:
            return None
        divides = operation(node) in QUOTIENTS and factor is left
        if divides or not is_uniform(factor):
            self._other(node)
            return None
        number = _number(factor, self._ctx)
        scale = 1 / number if operation(node) in QUOTIENTS and number else number
        if isinstance(kind, Branch):
            return dataclasses.replace(kind, multiplier=kind.multiplier * scale)
        self._note_multiplier(scale)
        return kind

    def _note_multiplier(self, scale: float) -> None:
        if not any(math.isclose(scale, known) for known in (1.0, *self.multipliers)):
            self.multipliers.append(scale)

    def _sum(self, node: Node) -> Any:
        left, right = (self.of(operand) for operand in operands(node))
        if left is None and right is None:
            return None
        if isinstance(left, Branch) and isinstance(right, Branch):
            if left.post_norm is not right.post_norm:
                return self._drop(node, left, right)
            return Branch(left.linears + right.linears, left.post_norm, left.multiplier)
        states = [kind for kind in (left, right) if isinstance(kind, (State, Normed))]
        if not states:
            return None  # a linear's output plus something else: RoPE, a computed bias
        for kind in states:
            if isinstance(kind, Normed):
                self._state_of(kind)
        branch = left if isinstance(left, Branch) else right
        if isinstance(branch, Branch):
            for linear in branch.linears:
                if self._linears[linear].ref.parameter_rows != self.width:
                    name = self._linears[linear].ref.weight
                    self.problems.append(f"{name} adds only some of its rows")
            self.writers.update(dict.fromkeys(branch.linears, branch.post_norm))
            self._note_multiplier(branch.multiplier)
        elif len(states) == 1:
            self.problems.append(f"{node.name} adds a value that comes from no linear")
        return State()

    def _drop(self, node: Node, *branches: Branch) -> None:
        names = [self._linears[n].ref.weight for b in branches for n in b.linears]
        if any(branch.post_norm for branch in branches):
            self.problems.append(f"{node.name} adds {names[0]} and others, some of them normalized")

    def _state_of(self, normed: Normed) -> State:
        if normed.site not in self.stream_norms:
            self.stream_norms.append(normed.site)
        return normed.state

    def _other(self, node: Node) -> None:
        """A use that is none of the stream's own."""
        if node.op == "output" or operation(node) in ASKS_SHAPE:
            return
        for source in node.all_input_nodes:
            kind = self.of(source)
            if isinstance(kind, (State, Normed)):
                what = "a norm of the stream" if isinstance(kind, Normed) else "the stream"
                self.problems.append(f"{node.name} ({operation(node)}) reads {what}")


def _number(factor: Any, ctx: Context) -> float:
    """A factor, or a scalar buffer's value (Gemma's embedding scale); 1 for a weight per token."""
    if not isinstance(factor, Node):
        return float(factor)
    value = ctx.values.get(uncast(factor))
    return float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else 1.0
