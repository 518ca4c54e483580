"""What a rewritten graph must satisfy, one rule per function. A broken rule is a bug in a pass."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch.fx import Graph, GraphModule, Node

from qoqc.errors import VerifyError
from qoqc.ir import ops
from qoqc.ir.spec import LinearSpec


def writes(graph: Graph) -> Counter[str]:
    """How often each in-place operation occurs: no pass may lose or add one."""
    names = Counter(
        str(node.target)
        for node in graph.nodes
        if node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
    )
    names["setitem"] = sum(node.target is operator.setitem for node in graph.nodes)
    names["kv4_append"] = sum(node.target is ops.kv4_append for node in graph.nodes)
    return names


def check(gm: GraphModule, writes_before: Counter[str]) -> None:
    """Raise VerifyError, naming the node, unless every rule holds."""
    if writes(gm.graph) != writes_before:
        raise VerifyError(f"in-place operations changed: {writes_before} -> {writes(gm.graph)}")
    for node in gm.graph.nodes:
        for rule in (linear_reads_quantized, linear_keeps_dtype, quantize_reads_float):
            reason = rule(node)
            if reason is not None:
                raise VerifyError(f"{node.format_node()}: {reason}")


def linear_reads_quantized(node: Node) -> str | None:
    """The activation inputs of a linear are the first three outputs of one quantizing op."""
    if node.target is not ops.w4a8_linear:
        return None
    for position, part in enumerate(node.args[:3]):
        is_part = (
            isinstance(part, Node)
            and part.target is operator.getitem
            and isinstance(part.args[0], Node)
            and part.args[0].target in ops.QUANTIZERS
            and part.args[1] == position
        )
        if not is_part:
            return f"argument {position} is not output {position} of a quantizing op"
    sources = {part.args[0] for part in node.args[:3] if isinstance(part, Node)}
    return None if len(sources) == 1 else "activation inputs come from different quantizing ops"


def linear_keeps_dtype(node: Node) -> str | None:
    """A w4a8_linear gives the dtype and size the model's own linear gave."""
    if node.target is not ops.w4a8_linear:
        return None
    spec, value = node.meta.get("qoqc"), node.meta.get("example_value")
    if not isinstance(spec, LinearSpec) or not isinstance(value, torch.Tensor):
        return "no spec or example value"
    if node.args[-1] != value.dtype or spec.dtype != value.dtype:
        return f"dtype {node.args[-1]} instead of {value.dtype}"
    if spec.out_features != value.shape[-1]:
        return f"{spec.out_features} output channels instead of {value.shape[-1]}"
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
