"""The inputs of o and down in one layer: smoothing of down, and the order of the channels."""

from __future__ import annotations

import torch
from torch import Tensor

from qoqc.calibrate.alpha import search_strength, smoothing_scale
from qoqc.calibrate.recipe import strength
from qoqc.calibrate.work import (
    Fold,
    LayerWork,
    flat_sample,
    judged_error,
    over_query_heads,
    squared_error,
)
from qoqc.ir.spec import GROUP
from qoqc.passes.folds.reorder import reorder
from qoqc.passes.folds.smooth_output import mlp_refusal, smooth_output
from qoqc.passes.folds.tensors import matrix
from qoqc.passes.structure.facts import AttentionBlock, LinearRef, MlpBlock, index_of


def down_step(work: LayerWork) -> None:
    """Smooth the input of each down with the strengths of the least output error."""
    if not work.recipe.smooth_output or work.layer is None:
        return
    for mlp in work.layer.mlps:
        if mlp.down.experts or mlp.down.weight not in work.packed:
            continue  # it stays in 16 bit
        reason = mlp_refusal(mlp)
        if reason is not None:
            work.record.refused.append(f"{mlp.down.weight}: {reason}")
            continue
        _smooth(work, mlp)


def _smooth(work: LayerWork, mlp: MlpBlock) -> None:
    name = mlp.down.weight
    inputs = work.inputs_of(name, work.tensors, work.recipe.kv_bits)
    activations = torch.stack([x.abs().amax((0, 1)) for x in inputs]).amax(0)
    x, weight = flat_sample(inputs), matrix(work.tensors, mlp.down)
    exact = x @ weight.t()
    weights = weight.abs().amax(0)

    def scale(alpha: float, beta: float) -> Tensor:
        return smoothing_scale(activations, weights, alpha, beta, name)

    def error(alpha: float, beta: float) -> float:
        divisor = scale(alpha, beta)
        tensors = {name: work.tensors[name].clone()}
        matrix(tensors, mlp.down).mul_(divisor)
        return squared_error(work.rounded_output(x / divisor, mlp.down, tensors), exact)

    search = search_strength(error, name)
    best = scale(search.best.alpha, search.best.beta)
    folded = {name: work.tensors[name].clone()}
    matrix(folded, mlp.down).mul_(best)
    outputs = torch.cat([part[0] @ weight.t() for part in inputs])
    scaled = [part / best for part in inputs]
    gain = _ratio(
        judged_error(work, scaled, outputs, mlp.down, folded),
        judged_error(work, inputs, outputs, mlp.down, work.tensors),
    )
    if gain < 1:
        work.apply(lambda structure, tensors: smooth_output(structure, tensors, {name: best}))
    work.record.strengths[name] = strength(search, gain)


def _ratio(error: float, plain: float) -> float:
    return error / plain if plain > 0 else 1.0


def reorder_step(work: LayerWork) -> None:
    """Sort the input channels of o and down by their largest activation, where that helps.

    Channels alike then share a group and its scale. After rotation and smoothing there may be
    nothing left to sort, and an order is not free of harm.
    """
    if not work.recipe.reorder or work.recipe.group_size != GROUP or work.layer is None:
        return
    attention = work.layer.attention
    if attention is not None and attention.v_norm is None:
        _reorder(work, attention.o, attention)
    for mlp in work.layer.mlps:
        if not mlp.down.experts:
            _reorder(work, mlp.down, None)


def _reorder(work: LayerWork, ref: LinearRef, attention: AttentionBlock | None) -> None:
    if ref.weight not in work.packed:
        return
    inputs = work.inputs_of(ref.weight, work.tensors, work.recipe.kv_bits)
    largest = torch.stack([x.abs().amax((0, 1)) for x in inputs]).amax(0)
    if attention is None:
        order = largest.argsort(dim=-1, descending=True, stable=True)
        columns = order
    else:
        order, columns = _within_heads(largest, attention)
    weight = matrix(work.tensors, ref)
    exact = torch.cat([part[0] @ weight.t() for part in inputs])
    folded = {ref.weight: work.tensors[ref.weight].clone()}
    matrix(folded, ref).copy_(weight[:, columns])
    moved = [part[..., columns] for part in inputs]
    error = judged_error(work, moved, exact, ref, folded)
    if error >= judged_error(work, inputs, exact, ref, work.tensors):
        return
    fold: Fold = lambda structure, tensors: reorder(structure, tensors, {ref.weight: order})  # noqa: E731
    if work.apply(fold):
        work.record.reordered.append(ref.weight)


def _within_heads(largest: Tensor, block: AttentionBlock) -> tuple[Tensor, Tensor]:
    """The order [kv_heads, value_dim] that the query heads share, and the columns of o it gives."""
    columns = index_of(block.columns).to(largest.device)
    kv_of = torch.tensor(block.kv_of, device=largest.device)
    heads = largest[columns].view(block.heads, block.value_dim)
    order = over_query_heads(heads, block).argsort(dim=-1, descending=True, stable=True)
    start = torch.arange(block.heads, device=largest.device)[:, None] * block.value_dim
    places = torch.arange(len(largest), device=largest.device)
    places[columns] = columns[(start + order[kv_of]).flatten()]
    return order, places
