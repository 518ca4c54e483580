"""Where new tokens enter the cache, and which attention reads them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Graph, Node

from qoqc.ir import ops
from qoqc.passes.cache_reads import is_only_shape_read
from qoqc.passes.fusing import written_between
from qoqc.passes.match import SDPA, base, example, is_call, is_method, is_view
from qoqc.passes.rotation_chain import Heads, heads_of
from qoqc.passes.structure.nodes import shape


@dataclasses.dataclass(frozen=True)
class AppendSite:
    """A kv4_append and the one attention of its keys: kv4_attention, or SDPA among the new tokens.

    apart  why a rotation or norm was left in front of q and k
    """

    append: Node
    attention: Node
    q: Heads
    k: Heads
    apart: str | None

    @property
    def inside(self) -> frozenset[Node]:
        """The nodes that nothing needs once q and k come out of one op."""
        return self.q.inside | self.k.inside

    def inputs(self) -> set[Node]:
        """What the op will read that the graph computes."""
        found = {self.append.args[6]}
        for heads in (self.q, self.k):
            found |= {heads.x}
            found |= {heads.turn.cos, heads.turn.sin} if heads.turn else set()
            found |= {heads.norm.weight} if heads.norm else set()
        return {node for node in found if isinstance(node, Node)}


def site_of(graph: Graph, append: Node) -> AppendSite | str:
    """What to fuse into the op at `append`, or why nothing can be."""
    k_pages: Any = append.args[0]
    key: Any = append.args[5]
    if sum(is_call(user, ops.kv4_append) for user in k_pages.users) > 1:
        return "its pages are appended to more than once"
    found = _attentions(append, key)
    if len(found) != 1:
        return f"{len(found)} attentions that can be fused read its keys, not one"
    (attention,) = found
    query: Any = attention.args[0]
    values = [example(x) for x in (query, key, append.args[6])]
    if not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in values):
        return "queries, keys or values do not have four axes"
    if len({x.dtype for x in values}) > 1:
        return "queries, keys and values differ in dtype"
    if shape(query)[2:] != shape(key)[2:] or shape(query)[0] != shape(key)[0]:
        return f"queries are {shape(query)}, keys {shape(key)}"
    site = _with_heads(append, attention, query, key)
    place = {node: number for number, node in enumerate(graph.nodes)}
    if any(place[node] > place[append] for node in site.inputs()):
        return "its queries are computed behind the append"
    first = min({append, *site.inside}, key=place.__getitem__)
    if written_between(graph, site.inputs(), first, attention):
        return "something on the way is written in place"
    return site


def _with_heads(append: Node, attention: Node, query: Node, key: Node) -> AppendSite:
    """Steps that queries and keys do not share stay in front of both."""
    turned = normed = True
    apart = None
    q, k = heads_of(query), heads_of(key)
    if not _turned_alike(q, k):
        turned, apart = False, "queries and keys are turned differently"
        q, k = heads_of(query, turned=False), heads_of(key, turned=False)
    if _grid(q) != _grid(k):
        normed, apart = False, "queries and keys are normed differently"
        q, k = (heads_of(x, turned=turned, normed=normed) for x in (query, key))
    return AppendSite(append, attention, q, k, q.apart or k.apart or apart)


def _turned_alike(q: Heads, k: Heads) -> bool:
    if q.turn is None or k.turn is None:
        return q.turn is k.turn
    forms = [(h.turn.form, h.turn.per_pair, h.head_axis) for h in (q, k) if h.turn]
    angles = (q.turn.cos, k.turn.cos), (q.turn.sin, k.turn.sin)
    return forms[0] == forms[1] and all(_same(a, b) for a, b in angles)


def _same(a: Any, b: Any) -> bool:
    """Are these one value, or the same view of one?"""
    if a is b or not is_view(a) or not is_view(b) or a.target != b.target:
        return a is b
    return _same(a.args[0], b.args[0]) and a.args[1:] == b.args[1:] and a.kwargs == b.kwargs


def _grid(heads: Heads) -> tuple[Any, ...] | None:
    norm = heads.norm
    return None if norm is None else (norm.eps, norm.offset, norm.round_first)


def _attentions(append: Node, key: Any) -> list[Node]:
    """The attentions over these pages, and the SDPAs whose keys are the new ones."""
    k_pages: Any = append.args[0]
    found = [user for user in k_pages.users if is_call(user, ops.kv4_attention)]
    queue, seen = [key], {key}
    while queue:
        here = queue.pop()
        found += [user for user in here.users if is_call(user, SDPA) and user.args[1] is here]
        forward = [u for u in here.users if (is_view(u) or is_call(u, ops.kv4_round))]
        fresh = [user for user in forward if user.args[0] is here and user not in seen]
        seen.update(fresh)
        queue += fresh
    return found


def count_of(graph: Graph, site: AppendSite) -> Node | str:
    """The `length.add_(1)` between append and attention of a decode step, or why they stay two.

    The fused op counts the token itself, so nothing but the attention may see the cache between.
    """
    attention, length = site.attention, site.append.args[4]
    if not is_call(attention, ops.kv4_attention) or shape(site.q.value)[2] != 1:
        return "more than one new token"
    if attention.args[7] is not None:
        return "attends to new tokens as they were before rounding"
    mask = attention.args[6]
    if mask is not None and shape(mask)[1] != 1:
        return "its mask differs from head to head"
    cache = {*site.append.args[:3], length}
    counts = []
    inside = False
    for node in graph.nodes:
        if node is attention:
            break
        if inside and _counts(node, length):
            counts.append(node)
        elif inside and _touches(node, cache):
            return f"{node.name} reads or writes the cache between append and attention"
        inside |= node is site.append
    return counts[0] if len(counts) == 1 else f"the new token is counted {len(counts)} times"


def _touches(node: Node, cache: set[Any]) -> bool:
    unread = is_call(node, ops.kv4_dequant) and is_only_shape_read(node)
    return not unread and any(base(x) in cache for x in node.all_input_nodes)


def _counts(node: Node, length: Any) -> bool:
    return is_method(node, "add_") and node.args == (length, 1) and not node.users
