"""Attention over a KV4 cache without materialising 16-bit keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.ir import kv_reference, ops
from qoqc.passes.cache_reads import (
    cache_read,
    is_16bit_cache,
    is_only_shape_read,
    keeps_whole_heads,
    layer_name,
)
from qoqc.passes.context import Context
from qoqc.passes.match import SDPA, example, is_call, is_method, source


def attention(gm: GraphModule, ctx: Context) -> int:
    """Fuse a cache read into the attention behind it: SDPA, or ops.attention with what SDPA lacks.

        k, v = kv4_dequant(pages, length, chunk);  o = sdpa(q, repeat_kv(k), repeat_kv(v), mask)
          ->  o = kv4_attention(q, pages, length, mask, chunk)

    ops.attention of a first chunk goes over the pages, too, which hold nothing before it:

        kv4_append(pages, length, k, v);  o = attention(q, k, v, mask, sinks, softcap)
          ->  kv4_append(...);  o = kv4_attention(q, pages, length, mask, chunk, softcap, sinks)

    Without a cache, prefill_kv="quantized" makes the chunk attend to its own rounded values:

        o = sdpa(q, k, v)  ->  o = sdpa(q, kv4_round(k), kv4_round(v))

    What is left of ops.attention becomes a call of its definition, which Inductor traces into.
    """
    count = 0
    found = [node for node in gm.graph.nodes if is_call(node, SDPA, ops.attention)]
    bits = _bits(ctx, len(found))
    for number, node in enumerate(found):
        read, name = cache_read(node), f"attention {number}"
        append = _append_before(gm, node)
        if isinstance(read, Node):
            count += _fuse(gm, ctx, node, read, name)
        elif append is not None:
            count += _fuse_first_chunk(gm, ctx, node, append, name)
        elif is_16bit_cache(node):
            reason = f"reads a 16-bit cache ({read}); generate through qoqc.compile or a KV4Cache"
            ctx.refuse(name, reason, kept=bits is not None and bits[number] == 16)
        elif ctx.options.prefill_kv == "quantized" and not is_call(
            source(node.args[1]), ops.kv4_round
        ):  # where it is, the cache did it already
            if bits is None:
                reason = (
                    f"kv_layers has {len(ctx.options.kv_layers)} layers, this graph another number"
                )
                ctx.refuse(name, reason)
            elif bits[number] != 16:
                count += _round_chunk(gm, node, bits[number])
    for node in gm.graph.nodes:
        if is_call(node, ops.kv4_dequant) and not is_only_shape_read(node):
            ctx.refuse(
                layer_name(ctx, node), "read outside SDPA: runs as dequantize + its own attention"
            )
        if is_call(node, ops.attention):
            node.target = kv_reference.attention
    return count


def _append_before(gm: GraphModule, node: Node) -> Node | None:
    """The append of the keys and values that an ops.attention reads as they were, or rounded.

    A cache gives new keys back as they are only while it holds no others.
    """
    if not is_call(node, ops.attention):
        return None
    key, value = (x.args[0] if is_call(x, ops.kv4_round) else x for x in node.args[1:3])
    if not isinstance(key, Node):
        return None
    appends = [u for u in key.users if is_call(u, ops.kv4_append) and u.args[5:7] == (key, value)]
    if len(appends) != 1:
        return None
    place = {each: number for number, each in enumerate(gm.graph.nodes)}
    length: Any = appends[0].args[4]
    counts = [user for user in length.users if is_method(user, "add_")]
    after = [u for u in counts if place[appends[0]] < place[u] < place[node]]
    return appends[0] if len(after) == 1 else None


def _fuse_first_chunk(gm: GraphModule, ctx: Context, node: Node, append: Node, name: str) -> int:
    *pages, length, _, _, bits = append.args
    key, value = node.args[1:3]
    chunk = (None, None) if is_call(key, ops.kv4_round) else (key, value)
    return _replace(gm, ctx, node, (*pages, length), chunk, bits, name)


def _fuse(gm: GraphModule, ctx: Context, sdpa: Node, read: Node, name: str) -> int:
    *cache, k_chunk, v_chunk, bits, _ = read.args
    *_, causal = _scores(sdpa)
    if causal:
        ctx.refuse(name, "is_causal over a filled cache: runs as dequantize + SDPA")
        return 0
    if is_call(sdpa, SDPA) and sdpa.kwargs["dropout_p"]:
        ctx.refuse(name, "attention dropout: runs as dequantize + SDPA")
        return 0
    if not keeps_whole_heads(sdpa.args[1], read, 0) or not keeps_whole_heads(sdpa.args[2], read, 1):
        ctx.refuse(name, "keys or values are sliced after the cache: runs as dequantize + SDPA")
        return 0
    return _replace(gm, ctx, sdpa, tuple(cache), (k_chunk, v_chunk), bits, name)


def _replace(
    gm: GraphModule,
    ctx: Context,
    node: Node,
    cache: tuple[Any, ...],
    chunk: tuple[Any, Any],
    bits: Any,
    name: str,
) -> int:
    """Put kv4_attention over `cache`, the pages and the length, in the place of an attention."""
    q = node.args[0]
    mask, sinks, scale, softcap, causal = _scores(node)
    if mask is not None and example(mask).dtype is not torch.bool:
        ctx.refuse(name, "additive mask: runs as dequantize + SDPA")
        return 0
    with gm.graph.inserting_before(node):
        # SDPA broadcasts a mask without batch and head axes; the op wants them
        for _ in range(0 if mask is None else 4 - example(mask).dim()):
            value = example(mask).unsqueeze(0)
            mask = gm.graph.call_method("unsqueeze", (mask, 0))
            mask.meta["example_value"] = value
        fused = gm.graph.call_function(
            ops.kv4_attention, (q, *cache, mask, *chunk, scale, bits, causal, softcap, sinks)
        )
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    gm.graph.erase_node(node)
    return 1


def _scores(node: Node) -> tuple[Any, Any, Any, Any, bool]:
    """(mask, sinks, scale, softcap, causal) of an SDPA or an ops.attention."""
    if is_call(node, ops.attention):
        mask, sinks, scale, softcap, causal = node.args[3:]
        return mask, sinks, scale, softcap, bool(causal)
    scale = node.kwargs["scale"]
    if scale is None:
        scale = float(example(node.args[0]).shape[-1]) ** -0.5
    return node.kwargs["attn_mask"], None, scale, 0.0, bool(node.kwargs["is_causal"])


def _bits(ctx: Context, attentions: int) -> Sequence[int] | None:
    """Bits by attention; None if kv_layers does not tell (graph breaks, attention without SDPA)."""
    if not ctx.options.kv_layers:
        return [ctx.options.kv_bits] * attentions
    return ctx.options.kv_layers if len(ctx.options.kv_layers) == attentions else None


def _round_chunk(gm: GraphModule, sdpa: Node, bits: int) -> int:
    q, k, v, *others = sdpa.args
    with gm.graph.inserting_before(sdpa):
        rounded = [gm.graph.call_function(ops.kv4_round, (x, bits)) for x in (k, v)]
    for new, old in zip(rounded, (k, v), strict=True):
        new.meta["example_value"] = example(old)
    sdpa.args = (q, *rounded, *others)
    return 1
