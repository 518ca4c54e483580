"""The facts of an attention: its linears, heads, RoPE and norms."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from qoqc.passes.structure.attention_sites import AttentionSite, window
from qoqc.passes.structure.facts import (
    AttentionBlock,
    HeadNorm,
    LinearRef,
    NormRef,
    are_disjoint,
    runs_of,
)
from qoqc.passes.structure.linears import LinearSite
from qoqc.passes.structure.nodes import shape
from qoqc.passes.structure.trace import Channels, Tracer


def attention_block(
    site: AttentionSite,
    o: LinearSite,
    tracer: Tracer,
    linears: dict[Node, LinearSite],
    norm: NormRef | None,
    post_norm: NormRef | None,
) -> AttentionBlock | str:
    """The facts of one attention, or why they cannot be told."""
    columns = tracer.channels(o.x)
    plain = columns is not None and columns.norm is None and not bool((columns.partner >= 0).any())
    if columns is None or not plain or columns.origin is not site.output:
        return f"{o.ref.weight}: the attention's output is changed before it"
    traced = [tracer.channels(node) for node in (site.q, site.k, site.v)]
    for name, found in zip(("queries", "keys", "values"), traced, strict=True):
        if found is None or found.origin not in linears:
            return f"{o.ref.weight}: the {name} before it do not come from one linear"
    q, k, v = _heads(traced[0]), _heads(traced[1], site.k_is_turned), _heads(traced[2])
    if q is None or k is None or v is None:
        return f"{o.ref.weight}: rows of its queries, keys or values change between tokens"
    grouping = _grouping(q, k, v)
    if isinstance(grouping, str):
        return f"{o.ref.weight}: {grouping}"
    first, kv_of = grouping
    k, v = k.of(first), v.of(first)
    partner = _partners(q)
    if partner is None or partner != _partners(k):
        return f"{o.ref.weight}: RoPE turns queries and keys, or their heads, differently"
    if bool((v.partner >= 0).any()):
        return f"{o.ref.weight}: RoPE turns the values"
    (heads, dim), value_dim = q.row.shape, v.row.shape[1]
    # columns.row[c] is the (head, channel) that column c reads
    order = columns.row.reshape(-1, columns.row.shape[-1])[0]
    if sorted(order.tolist()) != list(range(heads * value_dim)):
        return f"{o.ref.weight}: does not read every channel of the attention once"
    rope, rotary_dim = _rope(partner)
    q_ref, k_ref, v_ref = (_ref(heads_, linears) for heads_ in (q, k, v))
    if not are_disjoint([q_ref, k_ref, v_ref]):
        return f"{o.ref.weight}: its queries, keys and values share rows of a weight"
    return AttentionBlock(
        q=q_ref,
        k=k_ref,
        v=v_ref,
        o=o.ref,
        columns=runs_of(torch.argsort(order).tolist()),
        norm=norm,
        post_norm=post_norm,
        heads=heads,
        kv_heads=len(first),
        head_dim=dim,
        value_dim=value_dim,
        kv_of=kv_of,
        rope=rope,
        rotary_dim=rotary_dim,
        partner=partner,
        q_norm=_head_norm(q),
        k_norm=_head_norm(k),
        v_norm=_head_norm(v),
        softcap=site.softcap,
        window=window(site.mask),
    )


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Channels of one token, each tensor [heads, head_dim]."""

    source: Channels
    row: Tensor
    partner: Tensor
    place: Tensor

    def of(self, heads: list[int]) -> _Heads:
        return _Heads(self.source, self.row[heads], self.partner[heads], self.place[heads])


def _heads(channels: Channels | None, turned: bool = False) -> _Heads | None:
    """[..., heads, tokens, dim] -> [heads, dim], if all tokens agree."""
    if channels is None:
        return None
    parts = []
    for t in (channels.row, channels.partner, channels.place):
        t = t.transpose(-1, -2) if turned else t
        t = t.reshape(-1, *t.shape[-2:])
        if not bool((t == t[:, :1]).all()):
            return None
        parts.append(t[:, 0])
    return _Heads(channels, *parts)


def _grouping(q: _Heads, k: _Heads, v: _Heads) -> tuple[list[int], tuple[int, ...]] | str:
    """(a head of k for each distinct one, the key/value head of each query head)."""
    heads = q.row.shape[0]
    if k.row.shape[0] != v.row.shape[0] or heads % k.row.shape[0]:
        return f"{heads} query heads over {k.row.shape[0]} key and {v.row.shape[0]} value heads"
    repeat = heads // k.row.shape[0]
    distinct: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    numbers = []
    for head in range(k.row.shape[0]):
        rows = tuple(k.row[head].tolist())
        if rows not in distinct:
            distinct[rows] = len(distinct)
            first.append(head)
        elif not torch.equal(v.row[head], v.row[first[distinct[rows]]]):
            return "keys and values are grouped differently"
        numbers.append(distinct[rows])
    return first, tuple(numbers[head // repeat] for head in range(heads))


def _partners(heads: _Heads) -> tuple[int, ...] | None:
    """Per channel the channel of the same head that RoPE mixes in; None if heads differ."""
    found: set[tuple[int, ...]] = set()
    for row, partner in zip(heads.row.tolist(), heads.partner.tolist(), strict=True):
        place = {r: channel for channel, r in enumerate(row)}
        if any(p >= 0 and p not in place for p in partner):
            return None
        found.add(tuple(place[p] if p >= 0 else c for c, p in enumerate(partner)))
    return found.pop() if len(found) == 1 else None


def _rope(
    partner: tuple[int, ...],
) -> tuple[Literal["none", "half", "interleaved", "other"], int]:
    turned = [c for c, p in enumerate(partner) if p != c]
    count = len(turned)
    if count == 0:
        return "none", 0
    start, half = turned[0], count // 2
    offsets = [(p - start, c - start) for c, p in enumerate(partner) if p != c]
    if all(p == (c + half) % count for p, c in offsets):
        return "half", count
    if all(p == c ^ 1 for p, c in offsets):
        return "interleaved", count
    return "other", count


def _ref(heads: _Heads, linears: dict[Node, LinearSite]) -> LinearRef:
    whole = linears[heads.source.origin].ref
    return dataclasses.replace(whole, rows=runs_of(heads.row.flatten().tolist()))


def _head_norm(heads: _Heads) -> HeadNorm | None:
    site = heads.source.norm
    if site is None:
        return None
    spans = shape(site.source)[-1] != heads.row.shape[1]
    places = runs_of(heads.place.flatten().tolist())
    return HeadNorm(site.ref, places, heads.row.shape[0], spans)
