"""Smoothing of the inputs of o and down: outlier channels move into the weights behind them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qoqc.passes.context import Refusal
from qoqc.passes.folds.tensors import (
    FoldResult,
    Tensors,
    attentions,
    factors,
    map_columns,
    map_rows,
    mlps,
)
from qoqc.passes.structure.facts import AttentionBlock, MlpBlock, ModelStructure, index_of
from qoqc.passes.structure.mlp import HOMOGENEOUS


def smooth_output(
    structure: ModelStructure, tensors: Tensors, scales: Mapping[str, Tensor]
) -> FoldResult:
    """Divide the inputs of o and down by factors and multiply their columns (paper 4.3.2).

        y = O P (V x + c)             ->   y = (O l) P (V x / l + c / l)
        y = D (act(G x) * (U x + c))  ->   y = (D l) (act(G x) * (U x / l + c / l))
        y = D act(U x + c)            ->   y = (D l) act((U x + c) / l^(1/d)),  act of degree d

    scales: weight of o -> l [kv_heads, value_dim], shared by the query heads of a key/value head;
    weight of down -> l [intermediate], or [experts, intermediate].
    """
    known, known_mlps = attentions(structure), mlps(structure)
    applied, refused = [], []
    for name, scale in scales.items():
        reason: str | None = "no recognised attention or MLP ends in it"
        if name in known:
            reason = _values(name, known[name], scale, tensors)
        elif name in known_mlps:
            reason = _mlp(name, known_mlps[name], scale, tensors)
        if reason is None:
            applied.append(name)
        else:
            refused.append(Refusal(name, reason))
    return FoldResult(tuple(applied), tuple(refused))


def mlp_refusal(block: MlpBlock) -> str | None:
    """Why the input of down cannot be scaled; None if it can."""
    if block.gate is None and block.activation not in HOMOGENEOUS:
        return f"{block.activation} does not pass a factor on, and there is no gate"
    return None


def _values(name: str, block: AttentionBlock, scale: Tensor, tensors: Tensors) -> str | None:
    if block.v_norm is not None:
        return "the values are normalized after v"
    shape = (block.kv_heads, block.value_dim)
    scale = factors(name, scale, tensors[block.v.weight], shape)
    columns = scale.new_ones(block.o.in_features)
    columns[index_of(block.columns).to(scale.device)] = scale[list(block.kv_of)].flatten()
    map_rows(tensors, block.v, lambda w: w / scale.reshape(-1, 1))
    map_columns(tensors, block.o, lambda w: w * columns)
    return None


def _mlp(name: str, block: MlpBlock, scale: Tensor, tensors: Tensors) -> str | None:
    reason = mlp_refusal(block)
    if reason is not None:
        return reason
    size = block.down.in_features
    per_expert = block.down.experts > 0 and scale.dim() == 2
    shape = (block.down.experts, size) if per_expert else (size,)
    scale = factors(name, scale, tensors[block.up.weight], shape)
    degree = 1 if block.gate is not None else HOMOGENEOUS[block.activation]
    before = scale ** (1 / degree)
    map_rows(tensors, block.up, lambda w: w / before.unsqueeze(-1))
    map_columns(tensors, block.down, lambda w: w * scale.unsqueeze(-2))
    return None
