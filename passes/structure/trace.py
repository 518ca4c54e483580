"""Which row of which linear every element of a value comes from.

The graph's own views, slices and concatenations are run on tensors of row numbers, so every way to
fuse or reorder heads (contiguous, per head, grouped) is understood without a rule of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from qoqc.passes.match import argument, example
from qoqc.passes.structure.linears import LinearSite
from qoqc.passes.structure.nodes import (
    DIFFERENCES,
    PRODUCTS,
    QUOTIENTS,
    SUMS,
    is_copy,
    is_move,
    is_uniform,
    operands,
    operation,
    shape,
)
from qoqc.passes.structure.norms import NormSite

MAX_STEPS = 60
"""Nodes searched for a cosine behind a factor: it is at most 10 away in transformers 5."""


@dataclasses.dataclass(frozen=True)
class Channels:
    """Row numbers in the shape of a value that is `origin`'s output, moved about and scaled.

    row      int64: the row of the origin (a linear, or an attention: head * value_dim + channel)
    partner  the row that RoPE mixes in, -1 where none
    place    position in the weight of `norm`, which the value went through, -1 where none
    factor   "cos" or "sin" between RoPE's product and its sum
    """

    origin: Node
    row: Tensor
    partner: Tensor
    place: Tensor
    norm: NormSite | None = None
    factor: str = ""

    def moved(self, move: Callable[[Tensor], Any]) -> Any:
        """The channels after a move; a tuple of them if the move gives several."""
        parts = [move(t) for t in (self.row, self.partner, self.place)]
        if isinstance(parts[0], Tensor):
            return self._with(*parts)
        return tuple(self._with(*part) for part in zip(*parts, strict=True))

    def _with(self, row: Tensor, partner: Tensor, place: Tensor) -> Channels:
        return dataclasses.replace(self, row=row, partner=partner, place=place)


class Tracer:
    """Traces values back to linears and attentions; every node once."""

    def __init__(
        self,
        linears: Mapping[Node, LinearSite],
        norms: Mapping[Node, NormSite],
        attentions: Mapping[Node, Any],
    ) -> None:
        """Origins are the keys of `linears` and `attentions`; `norms` are stepped over."""
        self._linears = linears
        self._norms = norms
        self._attentions = attentions
        self._found: dict[Node, Any] = {}

    def channels(self, node: Any) -> Channels | None:
        """The channels of a value; None if it is anything but one origin moved and scaled."""
        found = self._part(node)
        return None if found is None or found.factor else found

    def knows(self, node: Node) -> bool:
        """Is this value made of one origin's channels, or a part of RoPE or of a norm on them?"""
        inside = any(node in site.inside for site in self._norms.values())
        return inside or self._trace(node) is not None

    def _part(self, node: Any) -> Channels | None:
        """The same, of a product inside RoPE too."""
        found = self._trace(node)
        return found if isinstance(found, Channels) else None

    def _trace(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return None
        if node not in self._found:
            found = self._visit(node)
            if isinstance(found, Channels) and tuple(found.row.shape) != shape(node):
                found = None
            self._found[node] = found
        return self._found[node]

    def _visit(self, node: Node) -> Any:
        name = operation(node)
        if node in self._linears or node in self._attentions:
            return self._origin(node)
        if node in self._norms:
            return self._normed(self._norms[node])
        if is_copy(node) or name == "neg":
            return self._trace(node.args[0])
        if is_move(node):
            return self._moved(node)
        if name in ("cat", "stack", "concat"):
            return self._joined(node)
        if name in PRODUCTS | QUOTIENTS:
            return self._scaled(node)
        if name in SUMS | DIFFERENCES:
            return self._turned(node)
        return None

    def _origin(self, node: Node) -> Channels:
        sizes = shape(node)
        if node in self._linears:
            row = torch.arange(sizes[-1]).expand(sizes)
        else:  # [..., heads, tokens, value_dim]
            heads, dim = sizes[-3], sizes[-1]
            row = torch.arange(heads * dim).view(heads, 1, dim).expand(sizes)
        none = torch.full_like(row, -1)
        return Channels(node, row, none, none)

    def _normed(self, site: NormSite) -> Channels | None:
        before = self.channels(site.source)
        if before is None or before.norm is not None:
            return None
        count = torch.Size(site.ref.shape).numel()
        place = torch.arange(count).view(site.ref.shape).expand(before.row.shape)
        return dataclasses.replace(before, place=place, norm=site)

    def _moved(self, node: Node) -> Any:
        source = self._trace(node.args[0])
        if isinstance(source, tuple):  # getitem of a chunk
            return source[node.args[1]] if operation(node) == "getitem" else None
        if not isinstance(source, Channels):
            return None
        if operation(node) == "getitem" and isinstance(node.args[1], Node):  # tokens by number
            return source.moved(lambda t: t[:1].expand(shape(node)))
        return source.moved(lambda t: _run(node, t))

    def _joined(self, node: Node) -> Channels | None:
        parts = [self._part(part) for part in argument(node, 0, "tensors")]
        dim = argument(node, 1, "dim", 0)
        found = [part for part in parts if part is not None]
        if len(found) != len(parts) or not _agree(found):
            return None
        join: Any = torch.stack if operation(node) == "stack" else torch.cat
        rows, partners, places = (
            join([getattr(part, name) for part in found], dim=dim)
            for name in ("row", "partner", "place")
        )
        return dataclasses.replace(found[0], row=rows, partner=partners, place=places)

    def _scaled(self, node: Node) -> Channels | None:
        left, right = (self._part(operand) for operand in operands(node))
        if (left is None) == (right is None):
            return None
        if left is None and operation(node) in QUOTIENTS:  # one over it
            return None
        found = left or right
        factor = operands(node)[1 if left is not None else 0]
        if is_uniform(factor):
            return found
        wave = self._wave(factor)
        if found is None or not wave or found.factor or operation(node) in QUOTIENTS:
            return None
        return dataclasses.replace(found, factor=wave)

    def _turned(self, node: Node) -> Channels | None:
        """RoPE: x * cos + turned(x) * sin."""
        left, right = (self._part(operand) for operand in operands(node))
        if left is None or right is None or not _agree([left, right], factors=False):
            return None
        if {left.factor, right.factor} != {"cos", "sin"}:
            return None
        main, other = (left, right) if left.factor == "cos" else (right, left)
        return dataclasses.replace(main, partner=other.row, factor="")

    def _wave(self, factor: Any) -> str:
        """Is a factor computed from a "cos" or a "sin", and from no linear?"""
        found, queue = "", [factor]
        seen: set[Node] = set()
        while queue and len(seen) < MAX_STEPS:
            node = queue.pop(0)
            if not isinstance(node, Node) or node in seen:
                continue
            if node in self._linears:
                return ""
            seen.add(node)
            if operation(node) in ("cos", "sin"):
                found = found or operation(node)
            else:
                queue.extend(node.all_input_nodes)
        return found


def _run(node: Node, value: Tensor) -> Any:
    """A move, run on `value` instead of its first argument."""
    mapped: Any = map_arg((node.args[1:], node.kwargs), example)
    rest, kwargs = mapped
    if operation(node) == "getattr":
        return getattr(value, rest[0])
    if operation(node) == "view":  # row numbers need not be laid out like the values
        return value.reshape(*rest)
    method = node.op == "call_method"
    target: Any = getattr(Tensor, str(node.target)) if method else node.target
    return target(value, *rest, **kwargs)


def _agree(parts: Sequence[Channels], factors: bool = True) -> bool:
    first = parts[0]
    return all(
        part.origin is first.origin
        and part.norm is first.norm
        and (not factors or part.factor == first.factor)
        for part in parts
    )
