"""The pass the project is named for: linears become integer GEMMs on packed weights."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.ir.spec import LinearSpec
from qoqc.passes.context import Context
from qoqc.passes.eligible import No, Site, note_tables, refuse_experts, site, weight_name
from qoqc.passes.match import LINEAR, LINEAR_GLU, example, is_call
from qoqc.quant.glu import in_turns
from qoqc.runtime.dynamo import add_static_input
from qoqc.runtime.weights import Bundle


def linear(gm: GraphModule, ctx: Context) -> int:
    """Quantize linears; returns how many weights.

    y = linear(x, w, b)
      ->  xq, xs, xsum = quantize_act(x);  y = w4a8_linear(xq, xs, xsum, packed..., b)

    linear_glu, which fuse_glu writes, becomes w4a8_glu in the same way.
    """
    count = 0
    note_tables(gm, ctx)
    packed: dict[int, dict[str, Node]] = {}
    for node in list(gm.graph.nodes):
        if not is_call(node, LINEAR, LINEAR_GLU):
            continue
        found = site(gm, node, ctx)
        if isinstance(found, No):
            ctx.refuse(weight_name(node, ctx), found.reason, kept=found.kept)
            continue
        glu = is_call(node, LINEAR_GLU)
        bundle = ctx.store.bundle(found.refs, ctx.options.group_size, glu=glu)
        if id(bundle) not in packed:
            packed[id(bundle)] = _inputs(gm, ctx, bundle, found)
            ctx.bundles.append((bundle, found.weights))
        _rewrite(gm, node, found, bundle, packed[id(bundle)])
        count += len(found.weights)
    refuse_experts(gm, ctx)
    return count


def _inputs(gm: GraphModule, ctx: Context, bundle: Bundle, found: Site) -> dict[str, Node]:
    """Placeholders for the packed tensors of a bundle, by field name."""
    stem = found.weights[0].name
    nodes = {}
    for field, tensor in bundle.packed.tensors().items():
        nodes[field] = add_static_input(gm.graph, f"{stem}_{field}", tensor)
        ctx.bound[nodes[field]] = tensor
    return nodes


def _rewrite(
    gm: GraphModule, node: Node, found: Site, bundle: Bundle, packed: dict[str, Node]
) -> None:
    dtype = example(node).dtype
    with gm.graph.inserting_before(node):
        quantized = gm.graph.call_function(ops.quantize_act, (found.x,))
        parts = [gm.graph.call_function(operator.getitem, (quantized, i)) for i in range(3)]
        if bundle.eight:  # its two nibbles stand one after the other, see quantize_weight8
            parts[0] = gm.graph.call_function(torch.cat, ((parts[0], parts[0]),), {"dim": -1})
        weight = (
            packed["qweight"],
            packed["channel_scale"],
            packed.get("group_word"),
            packed.get("channel_zero"),
        )
        bias = found.bias
        if bundle.glu:
            if bias is not None:
                bias = gm.graph.call_function(in_turns, (bias,))
            new = gm.graph.call_function(ops.w4a8_glu, (*parts, *weight, bias, dtype))
        else:
            new = gm.graph.call_function(ops.w4a8_linear, (*parts, *weight, bias, None, dtype))
    new.meta = dict(node.meta)
    new.meta["qoqc"] = LinearSpec(
        bundle.packed.in_features,
        bundle.packed.out_features,
        bundle.packed.group_size,
        dtype,
        has_bias=found.bias is not None,
        glu=bundle.glu,
    )
    new.meta["qoqc_bundle"] = bundle
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
