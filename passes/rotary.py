"""Rotation, quantization and append of new tokens as one op; in decode with attention, too."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.passes.append_sites import AppendSite, count_of, site_of
from qoqc.passes.cache_reads import layer_name
from qoqc.passes.context import Context, Refusal
from qoqc.passes.match import argument, example, is_call, is_method
from qoqc.passes.rotation_chain import Heads


def rotary(gm: GraphModule, ctx: Context) -> int:
    """Fuse head norm and rotation of q and k into the append; returns how many appends.

        q2, k2 = rotate(norm(q)), rotate(norm(k))
        kv4_append(pages, length, k2, v);  o = sdpa(q2, k2, v)
          ->  q2, k2 = kv4_rotate_append(q, k, v, weights, cos, sin, pages, length);  o = sdpa(...)

    One new token per sequence, which attends to the pages only:

        kv4_append(pages, length, k2, v);  length.add_(1);  o = kv4_attention(q2, pages, length)
          ->  o = kv4_decode(q, k, v, weights, cos, sin, pages, length)

    Steps that are not understood, or differ between q and k, stay in front of the op, which then
    has the form "none"; so has the decode step of a model without rotation. The ops compute in
    fp32 and round once, where a graph run op by op rounds after each: results differ by that.
    """
    count = 0
    for append in [node for node in gm.graph.nodes if is_call(node, ops.kv4_append)]:
        name = f"append of {layer_name(ctx, append)}"
        site = site_of(gm.graph, append)
        if isinstance(site, str):
            ctx.unfused.append(Refusal(name, site))
            continue
        if site.apart is not None:
            ctx.unfused.append(Refusal(name, site.apart))
        counting = count_of(gm.graph, site)
        if isinstance(counting, Node):
            _fuse_decode(gm, site, counting)
        elif site.inside:
            _fuse_append(gm, site)
        else:
            continue  # a plain append copies neither q nor k
        for node in reversed(list(gm.graph.nodes)):
            if node in site.inside and not node.users:
                gm.graph.erase_node(node)
        count += 1
    return count


def _fuse_append(gm: GraphModule, site: AppendSite) -> None:
    append = site.append
    place = {node: number for number, node in enumerate(gm.graph.nodes)}
    with gm.graph.inserting_before(append):
        front, grid = _arguments(gm, site)
        fused = gm.graph.call_function(
            ops.kv4_rotate_append, (*front, *append.args[:5], *grid, append.args[7])
        )
        outputs = [gm.graph.call_function(operator.getitem, (fused, i)) for i in range(2)]
    for heads, output in zip((site.q, site.k), outputs, strict=True):
        output.meta = dict(heads.value.meta)
        output.meta["example_value"] = example(heads.value).contiguous()
        for user in [user for user in heads.value.users if place.get(user, -1) > place[append]]:
            user.replace_input_with(heads.value, output)
    gm.graph.erase_node(append)


def _fuse_decode(gm: GraphModule, site: AppendSite, counting: Node) -> None:
    append, attention = site.append, site.attention
    mask, scale, bits = attention.args[6], attention.args[9], attention.args[10]
    softcap, sinks = attention.args[12:14]
    window = argument(attention, 14, "window", 0)
    with gm.graph.inserting_before(attention):
        front, grid = _arguments(gm, site)
        cache = (*append.args[:5], mask, sinks)
        fused = gm.graph.call_function(
            ops.kv4_decode, (*front, *cache, *grid, scale, softcap, bits, window)
        )
    fused.meta = dict(attention.meta)
    attention.replace_all_uses_with(fused)
    for node in (attention, counting, append):
        gm.graph.erase_node(node)


def _arguments(gm: GraphModule, site: AppendSite) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(q, k, v, q_weight, k_weight, cos, sin) and (form, eps, offset, round_first)."""
    heads = (site.q, site.k)
    q, k = (_head_major(gm, h) for h in heads)
    weights = (h.norm.weight if h.norm else None for h in heads)
    turn, norm = site.q.turn, site.q.norm or site.k.norm
    cos, sin = (
        (None, None) if turn is None else (_angles(gm, site.q, x) for x in (turn.cos, turn.sin))
    )
    return (
        (q, k, site.append.args[6], *weights, cos, sin),
        (
            "none" if turn is None else turn.form,
            norm.eps if norm else 0.0,
            norm.offset if norm else 0.0,
            bool(norm and norm.round_first),
        ),
    )


def _head_major(gm: GraphModule, heads: Heads) -> Node:
    """The input as [B, H, S, D]."""
    if not heads.swapped:
        return heads.x
    return _add(gm, torch.transpose, heads.x, 1, 2)


def _angles(gm: GraphModule, heads: Heads, angles: Node) -> Node:
    """Cosines or sines as the ops take them, [B or 1, S, R]."""
    assert heads.turn is not None
    flat = _without_heads(gm, angles, heads.head_axis)
    if not heads.turn.per_pair:
        return flat
    if heads.turn.form == "half":
        return _add(gm, torch.cat, (flat, flat), dim=-1)
    return _add(gm, torch.repeat_interleave, flat, 2, dim=-1)


def _without_heads(gm: GraphModule, angles: Node, axis: int) -> Node:
    dims = example(angles).dim()
    if dims == 2:  # [S, R]
        return _add(gm, torch.unsqueeze, angles, 0)
    if dims == 3:  # [1, S, R], the first axis that of the heads; or [S, 1, R]
        return angles if axis == 1 else _add(gm, torch.transpose, angles, 0, 1)
    original = angles.args[0] if is_method(angles, "unsqueeze") else None
    if isinstance(original, Node) and angles.args[1:] in ((axis,), (axis - 4,)):
        return original
    return _add(gm, torch.squeeze, angles, axis)


def _add(gm: GraphModule, function: Any, *args: Any, **kwargs: Any) -> Node:
    node = gm.graph.call_function(function, args, kwargs)
    values = torch.fx.node.map_arg(args, example)
    node.meta["example_value"] = function(*values, **kwargs)
    return node
