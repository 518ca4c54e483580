"""Which linears are quantized, and why the others are not: decided here only."""

from __future__ import annotations

import dataclasses
import fnmatch
import operator
import re
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from qoqc.ir import ops
from qoqc.ir.spec import GROUP, OUTPUT_DTYPES
from qoqc.passes.context import Context
from qoqc.passes.match import (
    LINEAR,
    LINEAR_GLU,
    SDPA,
    argument,
    example,
    is_call,
    is_method,
    is_view,
    source,
)
from qoqc.runtime.weights import WeightRef

MIN_FEATURES = 32
"""Below this a weight is smaller than the padding of one tile and its scales."""

ROUTING = frozenset({torch.topk, torch.argmax})
STOPS = frozenset({LINEAR, LINEAR_GLU, SDPA, F.embedding})
_PRODUCT = re.compile(r"mm|matmul|einsum")


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear that can be quantized: `weights` are the placeholders of its rows, in order."""

    x: Node
    weights: tuple[Node, ...]
    refs: tuple[WeightRef, ...]
    bias: Node | None


@dataclasses.dataclass(frozen=True)
class No:
    """Why a linear stays in 16 bit; `kept` if a rule wants it so."""

    reason: str
    kept: bool = False


def site(gm: GraphModule, node: Node, ctx: Context) -> Site | No:
    """The site of a normalized linear node, or why there is none."""
    x, weight, bias = cast("tuple[Any, Any, Any]", node.args)
    if any(is_call(n, *ROUTING) or is_method(n, "topk", "argmax") for n in downstream_near(node)):
        return No("router of experts", kept=True)
    # only merge() and models that join weights by rows write this
    joined = is_call(weight, torch.cat) and argument(weight, 1, "dim", 0) == 0
    parts = weight.args[0] if joined else [weight]
    found = [_weight(part, ctx) for part in parts]
    if any(isinstance(f, No) for f in found):
        return next(f for f in found if isinstance(f, No))
    refs = tuple(f[1] for f in found if not isinstance(f, No))
    placeholders = tuple(f[0] for f in found if not isinstance(f, No))
    for placeholder, ref in zip(placeholders, refs, strict=True):
        refusal = _refusal(gm, node, placeholder, ref, ctx)
        if refusal is not None:
            return refusal
    if ctx.options.lm_head == "w8a8" and _head_kind(gm, node, refs[0], ctx) is not None:
        refs = tuple(dataclasses.replace(ref, eight=True) for ref in refs)
    return Site(x, placeholders, refs, bias)


def weight_name(node: Node, ctx: Context) -> str:
    """The module path of a linear's weight without `.weight`, or the node's own name."""
    weight: Any = node.args[1]
    while isinstance(weight, Node) and weight.op != "placeholder":
        weight = weight.args[0] if weight.args else None
    return ctx.name(weight).removesuffix(".weight") if isinstance(weight, Node) else node.name


def _weight(node: Any, ctx: Context) -> tuple[Node, WeightRef] | No:
    transposed = is_method(node, "t")
    placeholder = node.args[0] if transposed else node
    param = ctx.parameter(placeholder) if isinstance(placeholder, Node) else None
    if param is None:
        return No("the weight is computed in the graph, not a parameter")
    if param.dim() != 2:
        return No(f"the weight has {param.dim()} dimensions, not 2")
    return placeholder, WeightRef(param, transposed, ctx.name(placeholder))


def _refusal(
    gm: GraphModule, node: Node, placeholder: Node, ref: WeightRef, ctx: Context
) -> No | None:
    name = ref.name.removesuffix(".weight")
    if any(fnmatch.fnmatch(name, pattern) for pattern in ctx.options.exclude):
        return No("excluded", kept=True)
    head = _head_kind(gm, node, ref, ctx)
    if head is not None and ctx.options.lm_head == "16":
        return No(head, kept=True)
    if _reads_cache(node.args[0]):
        return No("multiplies the whole cache at every step", kept=True)
    n, k = ref.dense().shape
    if min(n, k) < MIN_FEATURES:
        return No(f"{n} x {k} is below the smallest size worth packing, {MIN_FEATURES}", kept=True)
    if head is not None and ctx.options.lm_head == "w8a8" and k % GROUP:
        return No(f"{k} input channels are no multiple of {GROUP}, as an 8-bit head needs them")
    dtype = ref.param.dtype
    if dtype not in OUTPUT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in OUTPUT_DTYPES)
        return No(f"dtype {str(dtype).removeprefix('torch.')} is not one of {names}")
    return None


def _head_kind(gm: GraphModule, node: Node, ref: WeightRef, ctx: Context) -> str | None:
    """What makes this linear an output head, or None."""
    if any(ref.param is table for table in _tables(gm, ctx)):
        return "shares its weight with the embedding"
    return "output head" if _is_head(gm, node, ref, ctx) else None


def _is_head(gm: GraphModule, node: Node, ref: WeightRef, ctx: Context) -> bool:
    """As many rows as an embedding has, and on the way to the output no other linear."""
    if ref.dense().shape[0] not in {table.shape[0] for table in _tables(gm, ctx)}:
        return False
    return not any(is_call(n, *STOPS) for n in _after(node))


def note_tables(gm: GraphModule, ctx: Context) -> None:
    """Remember the embedding tables of this graph for the graphs behind a graph break."""
    for node in gm.graph.nodes:
        if is_call(node, F.embedding):
            param = ctx.parameter(argument(node, 1, "weight"))
            if param is not None:
                ctx.store.note_table(param)


def _tables(gm: GraphModule, ctx: Context) -> list[torch.Tensor]:
    """The embedding tables of this graph, or of earlier ones if it has none."""
    if ctx.tables is None:
        nodes = [argument(n, 1, "weight") for n in gm.graph.nodes if is_call(n, F.embedding)]
        own = [param for node in nodes if (param := ctx.parameter(node)) is not None]
        ctx.tables = [*own] or ctx.store.tables()
    return ctx.tables


def _after(node: Node) -> list[Node]:
    seen: dict[Node, None] = {}
    queue = list(node.users)
    while queue:
        current = queue.pop()
        if current not in seen:
            seen[current] = None
            if not is_call(current, *STOPS):
                queue.extend(current.users)
    return list(seen)


def downstream_near(node: Node, steps: int = 12) -> list[Node]:
    """Nodes that depend on `node` within a few steps and without another linear in between."""
    near: dict[Node, None] = {}
    frontier = [node]
    for _ in range(steps):
        frontier = [
            user
            for current in frontier
            for user in current.users
            if user not in near and not is_call(user, *STOPS)
        ]
        near.update(dict.fromkeys(frontier))
    return list(near)


def _reads_cache(x: Any) -> bool:
    """Is `x` what a cache gave back, or what the first prefill hands to it and on (MLA latents)?"""
    while is_view(x):
        if _is_appended(x):
            return True
        x = x.args[0]
    if _is_appended(x) or is_call(x, ops.kv4_round):
        return True
    if is_call(x, operator.getitem):
        return is_call(x.args[0], ops.kv4_dequant)
    if not isinstance(x, Node):
        return False
    if x.op == "placeholder":
        return any(is_method(user, "index_copy_") for user in x.users)
    dims = (x.kwargs.get("dim"), *(x.args[1:2]))
    value = example(x)
    return is_call(x, torch.cat) and any(d in (-2, 2) for d in dims) and value.dim() == 4


def _is_appended(x: Any) -> bool:
    return isinstance(x, Node) and any(is_call(user, ops.kv4_append) for user in x.users)


def refuse_experts(gm: GraphModule, ctx: Context) -> None:
    """Record matrix products with 3-D parameters, the experts of a mixture: no kernel for them yet.

    Their spelling depends on device and transformers release (grouped_mm, bmm, einsum), so they
    are told by the parameter, reached through views and casts.
    """
    for node in gm.graph.nodes:
        if node.op == "placeholder" or not _PRODUCT.search(_spelling(node)):
            continue
        for operand in node.all_input_nodes:
            weight = source(operand)
            param = ctx.parameter(weight) if isinstance(weight, Node) else None
            if param is not None and param.dim() > 2:
                reason = f"experts are one {param.dim()}-D parameter: left in 16 bit"
                ctx.refuse(ctx.name(weight), reason)


def _spelling(node: Node) -> str:
    return node.target if isinstance(node.target, str) else str(node.target)
