"""Remove what the rewrites left without users, and nothing else."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.passes.context import Context
from qoqc.passes.match import is_call, is_method, is_view

MASKS = (
    *(operator.and_, operator.or_, operator.le, operator.lt, operator.ge, operator.gt, operator.eq),
    *(operator.add, operator.sub, operator.mul, torch.arange, torch.ones, torch.logical_and),
    *(torch.full, torch._C._nn.pad),
)
"""What masks are written with."""

PURE_FUNCTIONS = (operator.getitem, getattr, torch.cat, ops.kv4_dequant, ops.quantize_act, *MASKS)

PURE_METHODS = ("t", "size", "new_ones", "new_zeros")


def cleanup(gm: GraphModule, ctx: Context) -> int:
    """Erase dead views, sizes, weight transposes, cache reads, masks and parameter placeholders.

        k = kv4_dequant(...)[0];  r = k.expand(...)      (no users)   ->   (gone)

    fx's own dead-code elimination takes in-place methods (`add_`, `index_copy_`) for pure and
    would drop cache updates, so only kinds known to be pure go. Placeholders go only if they are
    parameters: other inputs keep the call's signature.
    """
    count = 0
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and _is_removable(node, ctx):
            gm.graph.erase_node(node)
            ctx.bound.pop(node, None)
            count += 1
    return count


def _is_removable(node: Node, ctx: Context) -> bool:
    if node.op == "placeholder":
        return node in ctx.bound or ctx.parameter(node) is not None
    return is_view(node) or is_call(node, *PURE_FUNCTIONS) or is_method(node, *PURE_METHODS)
