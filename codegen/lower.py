"""Give the qoqc ops of a rewritten graph their executable form for the device it runs on."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qoqc.codegen import dispatch
from qoqc.codegen.pair import pair
from qoqc.config import Options
from qoqc.ir import glue, ops, reference
from qoqc.quant.activation import quantize_act
from qoqc.runtime.dynamo import add_static_input
from qoqc.runtime.weights import Bundle

DEFINITIONS: dict[Any, Any] = {
    ops.quantize_act: quantize_act,
    ops.norm_quant: glue.norm_quant,
    ops.act_quant: glue.act_quant,
}
"""What a CPU runs instead of the quantizing ops."""

LINEARS: dict[Any, Any] = {
    ops.w4a8_linear: reference.int8_linear,
    ops.w4a8_glu: reference.int8_glu,
}
"""What a CPU runs instead of the linears: their definitions, on weights expanded to int8."""


def lower(
    gm: GraphModule, bound: dict[Node, torch.Tensor], device: torch.device, options: Options
) -> int:
    """Lower `gm` in place for `device`; returns how many nodes changed.

    CUDA  Triton kernels are registered behind the ops, and a quantizer and its only linear become
          one op, which few tokens take in one launch.
    CPU   the quantizing ops and the linears become calls of their definitions, which Inductor
          traces into: norms, activations, scales and rounding fuse into loops, and the GEMM is
          torch's int8 one. Level 2 of the weights is expanded once for it, which costs twice the
          memory of the 4-bit weights; a CPU has no fast way to unpack nibbles at every call.
    """
    if device.type == "cuda":
        dispatch.install(options.tune, options.dump)
        return pair(gm)
    return _inline_quantizers(gm) + _expand_weights(gm, bound)


def _inline_quantizers(gm: GraphModule) -> int:
    count = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in DEFINITIONS:
            node.target = DEFINITIONS[node.target]
            count += 1
    return count


def _expand_weights(gm: GraphModule, bound: dict[Node, torch.Tensor]) -> int:
    count = 0
    expanded: dict[int, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in LINEARS:
            continue
        bundle: Bundle = node.meta["qoqc_bundle"]
        if id(bundle) not in expanded:
            weight = add_static_input(gm.graph, f"{node.args[3].name}_int8", bundle.int8())
            bound[weight] = bundle.int8()
            expanded[id(bundle)] = weight
        # what follows the weight, bias to dtype, is the same in the op and its definition
        xq, token_scale, _, qweight, channel_scale, word, zero, *others = node.args
        node.args = (xq, token_scale, expanded[id(bundle)], channel_scale, *others)
        node.kwargs = {"matmul": ops.int8_matmul}
        node.target = LINEARS[node.target]
        for dead in (qweight, word, zero):
            if isinstance(dead, Node) and not dead.users:
                bound.pop(dead)
                gm.graph.erase_node(dead)
        count += 1
    gm.recompile()
    return count
