"""One quantization per activation."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.passes.context import Context
from qoqc.passes.match import base, is_call, written


def share_quant(gm: GraphModule, ctx: Context) -> int:
    """Readers of the same activation share its quantize_act.

        a = quantize_act(x);  b = quantize_act(x)   ->   a = quantize_act(x);  b is a

    An in-place write to x in between keeps them apart.
    """
    count = 0
    live: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        target = written(node)
        if target is not None:
            live = {x: first for x, first in live.items() if base(x) is not target}
        if not is_call(node, ops.quantize_act):
            continue
        first = live.setdefault(node.args[0], node)
        if first is not node:
            # the readers index the tuple of results: move them over one by one
            for user in list(node.users):
                user.replace_input_with(node, first)
            gm.graph.erase_node(node)
            count += 1
    return count
