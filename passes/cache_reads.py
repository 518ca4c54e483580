"""Between a cache and what reads it: where keys come from, and what happens on the way."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from qoqc.ir import ops
from qoqc.passes.context import Context
from qoqc.passes.match import example, is_call, is_method, is_slice, is_view, source

CACHE_WRITES = frozenset({"index_copy_", "copy_", "scatter_"})
KEEP_ORDER = frozenset(
    {"view", "reshape", "contiguous", "expand", "unsqueeze", "squeeze", "flatten", "unflatten"}
    | {"repeat_interleave", "clone", "to", "type_as", "view_as"}
)


def cache_read(sdpa: Node) -> Any:
    """The kv4_dequant node behind K and V, or a word on what is there instead."""
    k, v = source(sdpa.args[1]), source(sdpa.args[2])
    both = is_call(k, operator.getitem) and is_call(v, operator.getitem)
    if both and is_call(k.args[0], ops.kv4_dequant) and k.args[0] is v.args[0]:
        return k.args[0]
    return f"{getattr(k, 'target', k)}"


def keeps_whole_heads(key: Any, read: Node, output: int) -> bool:
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


def is_16bit_cache(sdpa: Node) -> bool:
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


def is_only_shape_read(read: Node) -> bool:
    """After fusion: is nothing left that reads the dequantized values?"""
    return all(_dead(user) for user in read.users)


def _dead(node: Node) -> bool:
    # a size nobody uses: Dynamo asks for those it held for a variable while it traced
    harmless = is_view(node) or is_call(node, operator.getitem) or is_method(node, "size")
    return harmless and all(_dead(user) for user in node.users)


def layer_name(ctx: Context, node: Node) -> str:
    """The cache layer whose pages are the first argument of a kv4_dequant or kv4_append."""
    pages = node.args[0]
    return ctx.name(pages).removesuffix(".k_pages") if isinstance(pages, Node) else node.name
