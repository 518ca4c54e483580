"""Give the qoqc ops of a rewritten graph their executable form for the device it runs on."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from qoqc.codegen import dispatch
from qoqc.ir import ops
from qoqc.runtime.dynamo import add_static_input
from qoqc.runtime.weights import Bundle


def lower(gm: GraphModule, bound: dict[Node, torch.Tensor], device: torch.device) -> int:
    """Lower `gm` in place for `device`; returns how many nodes changed.

    CUDA: the ops keep their names, Triton kernels are registered behind them.
    CPU:  w4a8_linear -> int8_linear, with level 2 of the weights expanded once: a CPU has a fast
          int8 GEMM and no fast nibble unpacking. Costs twice the memory of the 4-bit weights.
    """
    if device.type == "cuda":
        dispatch.install()
        return 0
    return _expand_weights(gm, bound)


def _expand_weights(gm: GraphModule, bound: dict[Node, torch.Tensor]) -> int:
    count = 0
    expanded: dict[int, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not ops.w4a8_linear:
            continue
        bundle: Bundle = node.meta["qoqc_bundle"]
        if id(bundle) not in expanded:
            weight = add_static_input(gm.graph, f"{node.args[3].name}_int8", bundle.int8())
            bound[weight] = bundle.int8()
            expanded[id(bundle)] = weight
        xq, token_scale, _, qweight, channel_scale, word, zero, bias, residual, dtype = node.args
        node.args = (xq, token_scale, expanded[id(bundle)], channel_scale, bias, residual, dtype)
        node.target = ops.int8_linear
        for dead in (qweight, word, zero):
            if isinstance(dead, Node) and not dead.users:
                bound.pop(dead)
                gm.graph.erase_node(dead)
        count += 1
    gm.recompile()
    return count
