"""Causality and sliding windows that a graph writes as masks: arguments of attention over pages."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.passes.causal import counted
from qoqc.passes.context import Context
from qoqc.passes.mask_terms import Memo, is_past, is_true, terms_of, width_of, without
from qoqc.passes.match import example, is_call, is_copy_of, is_method, is_slice, written
from qoqc.runtime.dynamo import same_size


def windows(gm: GraphModule, ctx: Context) -> int:
    """Take what attention knows by itself out of its masks; returns out of how many.

        keys, queries = arange(T), arange(S) + length[0]
        length.add_(S)
        mask = ((keys <= queries) & (keys > queries - 512) & padding[b, keys]).expand(B, 1, S, T)
        o = kv4_attention(q, pages, length, mask, ...)
          ->  o = kv4_attention(q, pages, length, padding[b, keys].expand(...), ..., causal, 512)

    Masks are made from the length of one layer, that of its first sequence: all layers and
    sequences of a KV4Cache have as many tokens, padding included. Those of a first prompt, which
    has as many keys as queries, count from 0. Terms that are anything else,
    and windows whose width the graph is given, stay.
    """
    count = 0
    memo: Memo = {}
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    writes = [node for node in order if written(node) is not None]
    for node in [node for node in order if is_call(node, ops.kv4_attention)]:
        mask = node.args[6]
        places = _Places.of(node, ctx, order, writes)
        if not isinstance(mask, Node) or places is None:
            continue
        terms = list(terms_of(mask))
        past = {term for term in terms if places.are_past(term)}
        widths = {term: places.width(term) for term in terms}
        near = {term: width for term, width in widths.items() if width}
        if not (past or near) or len(set(near.values())) > 1:
            continue
        taken = frozenset(past | {*near} | {term for term in terms if is_true(term)})
        rest = without(gm, mask, taken, memo)
        if rest is not None and not same_size(example(rest).shape[-1], places.keys):
            continue
        *front, causal, softcap, sinks = node.args[:14]
        front[6] = rest
        node.args = (*front, causal or bool(past), softcap, sinks, max(near.values(), default=0))
        count += 1
    return count


@dataclasses.dataclass(frozen=True)
class _Places:
    """Which positions the keys and queries of one attention have.

    order   place of every node in the graph
    writes  nodes that write in place
    length  of its layer; counts the new tokens when attention reads it
    """

    ctx: Context
    order: dict[Node, int]
    writes: list[Node]
    length: Node
    keys: Any
    queries: Any

    @classmethod
    def of(
        cls, attention: Node, ctx: Context, order: dict[Node, int], writes: list[Node]
    ) -> _Places | None:
        """None where more than its new tokens is counted in front of it, or without a mask."""
        length, mask = attention.args[5], example(attention.args[6])
        if not isinstance(length, Node) or mask is None:
            return None
        queries = example(attention.args[0]).shape[2]
        counts = [n for n in writes if written(n) is length and order[n] < order[attention]]
        if len(counts) != 1 or not is_method(counts[0], "add_") or len(counts[0].args) != 2:
            return None
        added = counts[0].args[1]
        if not same_size(example(added) if isinstance(added, Node) else added, queries):
            return None
        return cls(ctx, order, writes, length, mask.shape[-1], queries)

    def are_past(self, term: Node) -> bool:
        """Is it `keys <= queries`?"""
        return is_past(term, self._are_keys, self._are_queries)

    def width(self, term: Node) -> int:
        """W, if it is `keys > queries - W`; else 0."""
        return width_of(term, self._are_keys, self._are_queries)

    def _are_keys(self, node: Any) -> bool:
        """0, 1, .. along the last axis?"""
        found = counted(node, -1) if isinstance(node, Node) else None
        return found is not None and found[1] == 0 and same_size(found[0], self.keys)

    def _are_queries(self, node: Any) -> bool:
        """The number of cached tokens and the numbers after it, along the axis before the last?"""
        found = counted(node, -2) if isinstance(node, Node) else None
        if found is None or not same_size(found[0], self.queries):
            return False
        if not isinstance(found[1], Node):
            # a first prompt: it is all that there is to attend to
            return found[1] == 0 and same_size(self.keys, self.queries)
        cached: Any = found[1]
        while is_copy_of(cached):
            cached = cached.args[0]
        if not is_slice(cached) or cached.args[1] != 0 or not self._is_length(cached.args[0]):
            return False
        # `length[0]` is a view of what is counted up: it is read where positions are computed
        read = max(self.order.get(user, len(self.order)) for user in found[1].users)
        length = cached.args[0]
        return all(read < self.order[n] for n in self.writes if written(n) is length)

    def _is_length(self, node: Any) -> bool:
        """The length of a layer of the same cache?"""
        if not isinstance(node, Node) or node.op != "placeholder":
            return False
        appends = any(is_call(user, ops.kv4_append) and user.args[4] is node for user in node.users)
        names = (re.sub(r"\d+", "", self.ctx.name(x)) for x in (self.length, node))
        return appends and len(set(names)) == 1
