"""Sliding windows of a first prompt: an op that passes over the keys before them, not a mask."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from qoqc.ir.windowed import window_attention
from qoqc.passes.causal import before_repeat, counted
from qoqc.passes.context import Context
from qoqc.passes.mask_terms import is_past, is_true, terms_of, width_of
from qoqc.passes.match import SDPA, example, is_call
from qoqc.runtime.dynamo import same_size


def prompt_windows(gm: GraphModule, ctx: Context) -> int:
    """Take causal masks with a window, and heads repeated for them, out of SDPA; returns how many.

        keys, queries = arange(S)[None, :], arange(S)[:, None]
        o = sdpa(q, repeat_kv(k), repeat_kv(v), attn_mask=(keys <= queries) & (keys > queries - W))
          ->  o = window_attention(q, k, v, scale, W)

    Masks that say more (padding), and windows whose width the graph is given, stay.
    """
    count = 0
    for node in gm.graph.nodes:
        if not is_call(node, SDPA) or node.kwargs["is_causal"] or node.kwargs["dropout_p"]:
            continue
        q, *wide = node.args
        width = _window(node.kwargs["attn_mask"], *(example(x).shape[-2] for x in (q, wide[0])))
        if not width:
            continue
        heads = [before_repeat(x) for x in wide]
        k, v = wide if None in heads else heads
        scale = node.kwargs["scale"]
        if scale is None:
            scale = float(example(q).shape[-1]) ** -0.5
        with gm.graph.inserting_before(node):
            fused = gm.graph.call_function(window_attention, (q, k, v, scale, width))
        value = window_attention(example(q), example(k), example(v), scale, width)
        fused.meta = {**node.meta, "example_value": value}
        node.replace_all_uses_with(fused)
        gm.graph.erase_node(node)
        count += 1
    return count


def _window(mask: Any, queries: Any, keys: Any) -> int:
    """W, if a mask is `keys <= queries` and `keys > queries - W`, both counted from 0; else 0."""
    if not isinstance(mask, Node) or not same_size(queries, keys):
        return 0

    def are_counted(node: Any, axis: int) -> bool:
        found = counted(node, axis) if isinstance(node, Node) else None
        return found is not None and found[1] == 0 and same_size(found[0], queries)

    def are_keys(node: Any) -> bool:
        return are_counted(node, -1)

    def are_queries(node: Any) -> bool:
        return are_counted(node, -2)

    terms = [term for term in terms_of(mask) if not is_true(term)]
    past = [term for term in terms if is_past(term, are_keys, are_queries)]
    widths = [width_of(term, are_keys, are_queries) for term in terms]
    if not past or len(past) + sum(map(bool, widths)) != len(terms):
        return 0
    return min(filter(None, widths), default=0)
