"""What a rewritten graph must satisfy, one rule per function. A broken rule is a bug in a pass."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qoqc.errors import VerifyError
from qoqc.ir import ops
from qoqc.ir.rotary import ROTARY_FORMS
from qoqc.ir.spec import LinearSpec


def writes(graph: Graph) -> Counter[str]:
    """How often each in-place operation occurs: no pass may lose or add one."""
    names = Counter(
        str(node.target)
        for node in graph.nodes
        if node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
    )
    names["setitem"] = sum(node.target is operator.setitem for node in graph.nodes)
    appends = (ops.kv4_append, ops.kv4_rotate_append, ops.kv4_decode)
    names["kv4_append"] = sum(node.target in appends for node in graph.nodes)
    counting = sum(node.target is ops.kv4_decode for node in graph.nodes)
    if counting:  # it adds the new token to the length itself
        names["add_"] += counting
    return names


def check(gm: GraphModule, writes_before: Counter[str]) -> None:
    """Raise VerifyError, naming the node, unless every rule holds."""
    if writes(gm.graph) != writes_before:
        raise VerifyError(f"in-place operations changed: {writes_before} -> {writes(gm.graph)}")
    for node in gm.graph.nodes:
        for rule in RULES:
            reason = rule(node)
            if reason is not None:
                raise VerifyError(f"{node.format_node()}: {reason}")


LINEARS = (ops.w4a8_linear, ops.w4a8_glu)


def linear_reads_quantized(node: Node) -> str | None:
    """The activation inputs of a linear are the first three outputs of one quantizing op.

    The first of them twice, where the weight holds two nibbles of each (quantize_weight8).
    """
    if node.target not in LINEARS:
        return None
    given = list(node.args[:3])
    if isinstance(given[0], Node) and given[0].target is torch.cat:
        twice: Any = given[0].args[0]
        if len(twice) != 2 or twice[0] is not twice[1]:
            return "argument 0 joins different tensors"
        given[0] = twice[0]
    for position, part in enumerate(given):
        is_part = (
            isinstance(part, Node)
            and part.target is operator.getitem
            and isinstance(part.args[0], Node)
            and part.args[0].target in ops.QUANTIZERS
            and part.args[1] == position
        )
        if not is_part:
            return f"argument {position} is not output {position} of a quantizing op"
    sources = {part.args[0] for part in given if isinstance(part, Node)}
    return None if len(sources) == 1 else "activation inputs come from different quantizing ops"


def linear_keeps_dtype(node: Node) -> str | None:
    """A quantized linear gives the dtype and size of what it replaced; w4a8_glu half its rows."""
    if node.target not in LINEARS:
        return None
    spec, value = node.meta.get("qoqc"), node.meta.get("example_value")
    if not isinstance(spec, LinearSpec) or not isinstance(value, torch.Tensor):
        return "no spec or example value"
    if spec.glu is not (node.target is ops.w4a8_glu):
        return f"its spec says glu={spec.glu}"
    if node.args[-1] != value.dtype or spec.dtype != value.dtype:
        return f"dtype {node.args[-1]} instead of {value.dtype}"
    channels = spec.out_features // (2 if spec.glu else 1)
    if channels != value.shape[-1]:
        return f"{channels} output channels instead of {value.shape[-1]}"
    return None


def quantize_reads_float(node: Node) -> str | None:
    """A quantizing op reads a floating-point tensor."""
    if node.target not in ops.QUANTIZERS:
        return None
    source = node.args[0]
    value = source.meta.get("example_value") if isinstance(source, Node) else None
    if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
        return f"quantizes {value.dtype}"
    return None


def rotation_is_whole(node: Node) -> str | None:
    """A fused append has both angles or, in the form "none", neither; both norm weights or none."""
    if node.target not in (ops.kv4_rotate_append, ops.kv4_decode):
        return None
    q, _, _, q_weight, k_weight, cos, sin = node.args[:7]
    form = next(argument for argument in node.args if isinstance(argument, str))
    if form not in ROTARY_FORMS:
        return f"rotates in the form {form!r}"
    if {cos is None, sin is None} != {form == "none"}:
        return f"form {form!r} with angles {cos} and {sin}"
    if (q_weight is None) != (k_weight is None):
        return "norms only one of queries and keys"
    query, angles = (x.meta.get("example_value") if isinstance(x, Node) else None for x in (q, cos))
    if query is None or query.dim() != 4:
        return "queries do not have four axes"
    if node.target is ops.kv4_decode and query.shape[2] != 1:
        return f"a decode step of {query.shape[2]} tokens per sequence"
    if angles is not None and (angles.dim() != 3 or angles.shape[2] > query.shape[3]):
        return f"angles {tuple(angles.shape)} for queries {tuple(query.shape)}"
    return None


RULES = (linear_reads_quantized, linear_keeps_dtype, quantize_reads_float, rotation_is_whole)
