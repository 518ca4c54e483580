"""Attention over a KV4 cache without materialising 16-bit keys and values."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.passes.context import Context
from qoqc.passes.match import SDPA, example, is_call, is_method, is_slice, is_view, source

CACHE_WRITES = frozenset({"index_copy_", "copy_", "scatter_"})
KEEP_ORDER = frozenset(
    {"view", "reshape", "contiguous", "expand", "unsqueeze", "squeeze", "flatten", "unflatten"}
    | {"repeat_interleave", "clone", "to", "type_as", "view_as"}
)


def attention(gm: GraphModule, ctx: Context) -> int:
    """Fuse a cache read into the attention behind it.

        k, v = kv4_dequant(pages, length, chunk);  o = sdpa(q, repeat_kv(k), repeat_kv(v), mask)
          ->  o = kv4_attention(q, pages, length, mask, chunk)

    Without a cache, prefill_kv="quantized" makes the chunk attend to its own rounded values:

        o = sdpa(q, k, v)  ->  o = sdpa(q, kv4_round(k), kv4_round(v))
    """
    count = 0
    found = [node for node in gm.graph.nodes if is_call(node, SDPA)]
    bits = _bits(ctx, len(found))
    for number, node in enumerate(found):
        read = _cache_read(node)
        if isinstance(read, Node):
            count += _fuse(gm, ctx, node, read, f"attention {number}")
        elif _is_16bit_cache(node):
            reason = f"reads a 16-bit cache ({read}); generate through qoqc.compile or a KV4Cache"
            ctx.refuse(f"attention {number}", reason, kept=bits is not None and bits[number] == 16)
        elif ctx.options.prefill_kv == "quantized" and not is_call(
            source(node.args[1]), ops.kv4_round
        ):  # where it is, the cache did it already
            if bits is None:
                reason = (
                    f"kv_layers has {len(ctx.options.kv_layers)} layers, this graph another number"
                )
                ctx.refuse(f"attention {number}", reason)
            elif bits[number] != 16:
                count += _round_chunk(gm, node, bits[number])
    for node in gm.graph.nodes:
        if is_call(node, ops.kv4_dequant) and not _is_only_shape_read(node):
            ctx.refuse(
                _layer_name(ctx, node), "read outside SDPA: runs as dequantize + its own attention"
            )
    return count


def _cache_read(sdpa: Node) -> Any:
    """The kv4_dequant node behind K and V, or a word on what is there instead."""
    k, v = source(sdpa.args[1]), source(sdpa.args[2])
    both = is_call(k, operator.getitem) and is_call(v, operator.getitem)
    if both and is_call(k.args[0], ops.kv4_dequant) and k.args[0] is v.args[0]:
        return k.args[0]
    return f"{getattr(k, 'target', k)}"


def _fuse(gm: GraphModule, ctx: Context, sdpa: Node, read: Node, name: str) -> int:
    q, mask = sdpa.args[0], sdpa.kwargs["attn_mask"]
    *pages, length, k_chunk, v_chunk, bits, _ = read.args
    query = example(q)
    if mask is not None and example(mask).dtype is not torch.bool:
        ctx.refuse(name, "additive mask: runs as dequantize + SDPA")
        return 0
    if sdpa.kwargs["is_causal"]:
        ctx.refuse(name, "is_causal over a filled cache: runs as dequantize + SDPA")
        return 0
    if sdpa.kwargs["dropout_p"]:
        ctx.refuse(name, "attention dropout: runs as dequantize + SDPA")
        return 0
    if not _whole_heads(sdpa.args[1], read, 0) or not _whole_heads(sdpa.args[2], read, 1):
        ctx.refuse(name, "keys or values are sliced after the cache: runs as dequantize + SDPA")
        return 0
    scale = sdpa.kwargs["scale"]
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    with gm.graph.inserting_before(sdpa):
        # SDPA broadcasts a mask without batch and head axes; the op wants them
        for _ in range(0 if mask is None else 4 - example(mask).dim()):
            mask = gm.graph.call_method("unsqueeze", (mask, 0))
        fused = gm.graph.call_function(
            ops.kv4_attention, (q, *pages, length, mask, k_chunk, v_chunk, scale, bits, False)
        )
    fused.meta = dict(sdpa.meta)
    sdpa.replace_all_uses_with(fused)
    gm.graph.erase_node(sdpa)
    return 1


def _whole_heads(key: Any, read: Node, output: int) -> bool:
    """Do the views between cache and SDPA only repeat each head, keeping tokens and channels?

    True for chains of nodes that cannot reorder, over shapes [B, H, (1 or r,) T, D] and
    [B, H * r, T, D]: that is repeat_interleave, however it is spelled.
    """
    cached = example(read)
    if cached is None or not isinstance(key, Node) or source(key).args[1] != output:
        return False
    batch, heads, *tail = cached[output].shape
    while is_view(key):
        shape = list(example(key).shape)
        repeated = len(shape) == 5 and shape[1] == heads
        merged = len(shape) == 4 and shape[1] % heads == 0
        if not (repeated or merged) or shape[0] != batch or shape[-2:] != tail:
            return False
        if is_slice(key) and not _is_whole(key.args[1]):
            return False
        if not is_slice(key) and not is_method(key, *KEEP_ORDER):
            return False
        key = key.args[0]
    return True


def _is_whole(index: Any) -> bool:
    """Does indexing with this only add axes?"""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or part == slice(None) for part in parts)


def _bits(ctx: Context, attentions: int) -> Sequence[int] | None:
    """Bits by attention; None if kv_layers does not tell (graph breaks, attention without SDPA)."""
    if not ctx.options.kv_layers:
        return [ctx.options.kv_bits] * attentions
    return ctx.options.kv_layers if len(ctx.options.kv_layers) == attentions else None


def _round_chunk(gm: GraphModule, sdpa: Node, bits: int) -> int:
    q, k, v = sdpa.args
    with gm.graph.inserting_before(sdpa):
        rounded = [gm.graph.call_function(ops.kv4_round, (x, bits)) for x in (k, v)]
    for new, old in zip(rounded, (k, v), strict=True):
        new.meta["example_value"] = example(old)
    sdpa.args = (q, *rounded)
    return 1


def _is_16bit_cache(sdpa: Node) -> bool:
    """Is the key the result of an in-place cache write, or a concatenation along the tokens?"""
    key = sdpa.args[1]
    while is_view(key):
        if any(u.op == "call_method" and u.target in CACHE_WRITES for u in key.args[0].users):
            return True
        key = key.args[0]
    if not isinstance(key, Node):
        return False
    written = any(u.op == "call_method" and u.target in CACHE_WRITES for u in key.users)
    dim = (key.args[1] if len(key.args) > 1 else key.kwargs.get("dim", 0)) if key.args else 0
    joined = is_call(key, torch.cat) and dim in (-2, 2)
    return written or joined or key.op == "placeholder"


def _is_only_shape_read(read: Node) -> bool:
    """After fusion: is nothing left that reads the dequantized values?"""
    return all(_dead(user) for user in read.users)


def _dead(node: Node) -> bool:
    harmless = is_view(node) or is_call(node, operator.getitem)
    return harmless and all(_dead(user) for user in node.users)


def _layer_name(ctx: Context, read: Node) -> str:
    pages = read.args[0]
    return ctx.name(pages).removesuffix(".k_pages") if isinstance(pages, Node) else read.name
