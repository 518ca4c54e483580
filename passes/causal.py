"""A causal mask that the graph builds itself becomes SDPA's own, which fast kernels know."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.passes.context import Context
from qoqc.passes.fusing import operands
from qoqc.passes.match import SDPA, example, is_call, is_method, is_slice
from qoqc.runtime.dynamo import same_size


def causal(gm: GraphModule, ctx: Context) -> int:
    """Take the mask, and the heads repeated for it, out of SDPA; returns how many.

        mask = (arange(S)[None, None, None, :] <= arange(S)[None, None, :, None]).expand(...)
        o = sdpa(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)
          ->  o = sdpa(q, k, v, is_causal=True, enable_gqa=True)

    Some releases of transformers write masks out while they are compiled.
    """
    count = 0
    for node in gm.graph.nodes:
        if not is_call(node, SDPA) or node.kwargs["is_causal"]:
            continue
        if not _is_triangle(node.kwargs["attn_mask"], node.args[0]):
            continue
        node.kwargs = {**node.kwargs, "attn_mask": None, "is_causal": True}
        q, *repeated = node.args
        heads = [before_repeat(x) for x in repeated]
        if None not in heads:
            node.args = (q, *heads)
            node.kwargs = {**node.kwargs, "enable_gqa": True}
        count += 1
    return count


def _is_triangle(mask: Any, q: Node) -> bool:
    """Is it `key position <= query position`, both counted from 0 to the number of queries?"""
    while is_method(mask, "expand"):
        mask = mask.args[0]
    if is_call(mask, operator.le, torch.le):
        key, query = mask.args
    elif is_call(mask, operator.ge, torch.ge):
        query, key = mask.args
    else:
        return False
    if not isinstance(key, Node) or not isinstance(query, Node):
        return False
    queries = example(q).shape[-2]
    along_keys, along_queries = counted(key, -1), counted(query, -2)
    if along_keys is None or along_queries is None or (along_keys[1], along_queries[1]) != (0, 0):
        return False
    return same_size(along_keys[0], queries) and same_size(along_queries[0], queries)


def counted(positions: Any, axis: int) -> tuple[Any, Any] | None:
    """(n, start) if the values are start to start + n - 1 along `axis`, the same along every other.

    start is an integer, or a node of one: a number or a tensor without axes. None for other values.
    """
    value = example(positions)
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        return None
    shape = value.shape
    others = [size for i, size in enumerate(shape) if i != len(shape) + axis]
    if len(shape) < -axis or any(size != 1 for size in others):
        return None
    while is_slice(positions):
        index = positions.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if any(part not in (None, Ellipsis, slice(None)) for part in parts):
            return None
        positions = positions.args[0]
    start: Any = 0
    both = operands(positions, "add")
    if both is not None:
        positions, start = both if is_call(both[0], torch.arange) else reversed(both)
        first = example(start) if isinstance(start, Node) else start
        if isinstance(first, torch.Tensor) and first.dim():
            return None
    counts = is_call(positions, torch.arange) and len(positions.args) == 1
    return (shape[axis], start) if counts else None


def before_repeat(heads: Any) -> Node | None:
    """k of `k[:, :, None].expand(B, H, r, S, D).reshape(B, H * r, S, D)`; None if it is not so."""
    if not is_method(heads, "reshape") or not is_method(heads.args[0], "expand"):
        return None
    wide = heads.args[0]
    if not is_slice(wide.args[0]):
        return None
    single = wide.args[0]
    few = single.args[0]
    batch, count, *tail = example(few).shape
    kept = list(example(single).shape) == [batch, count, 1, *tail]
    spread = example(wide).shape
    repeats = spread[2]
    spread_out = list(spread) == [batch, count, repeats, *tail]
    merged = list(example(heads).shape) == [batch, count * repeats, *tail]
    return few if kept and spread_out and merged else None
