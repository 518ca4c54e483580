"""Reordering of the inputs of o and down, so that channels alike share a group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qoqc.passes.context import Refusal
from qoqc.passes.folds.tensors import (
    FoldResult,
    Tensors,
    attentions,
    map_columns,
    map_rows,
    mlps,
)
from qoqc.passes.structure.facts import AttentionBlock, MlpBlock, ModelStructure, index_of


def reorder(
    structure: ModelStructure, tensors: Tensors, orders: Mapping[str, Tensor]
) -> FoldResult:
    """Permute the inputs of o and down, and what makes them (paper 4.3.3).

        y = D (act(G x) * (U x))   ->   y = D[:, p] (act(G[p] x) * (U[p] x))

    orders: weight of o -> [kv_heads, value_dim], a permutation of the channels of each key/value
    head, shared by its query heads; weight of down -> [intermediate], or [experts, intermediate].
    New channel i is old channel order[i].
    """
    known, known_mlps = attentions(structure), mlps(structure)
    applied, refused = [], []
    for name, order in orders.items():
        if name in known and known[name].v_norm is not None:
            refused.append(Refusal(name, "the values are normalized after v"))
        elif name in known:
            _values(name, known[name], order, tensors)
            applied.append(name)
        elif name in known_mlps:
            _mlp(name, known_mlps[name], order, tensors)
            applied.append(name)
        else:
            refused.append(Refusal(name, "no recognised attention or MLP ends in it"))
    return FoldResult(tuple(applied), tuple(refused))


def _check(name: str, order: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(order.shape) != shape:
        raise ValueError(f"{name}: order of shape {list(order.shape)}, expected {list(shape)}")
    expected = torch.arange(shape[-1], device=order.device).expand(shape)
    if not torch.equal(order.sort(-1).values, expected):
        raise ValueError(f"{name}: the order is no permutation of {shape[-1]} channels")


def _values(name: str, block: AttentionBlock, order: Tensor, tensors: Tensors) -> None:
    _check(name, order, (block.kv_heads, block.value_dim))
    order = order.to(tensors[block.v.weight].device)
    start = torch.arange(block.kv_heads, device=order.device)[:, None] * block.value_dim
    rows = (start + order).flatten()
    start = torch.arange(block.heads, device=order.device)[:, None] * block.value_dim
    channels = (start + order[list(block.kv_of)]).flatten()
    columns = index_of(block.columns).to(order.device)
    inputs = torch.empty_like(columns)
    inputs[columns] = columns[channels]
    map_rows(tensors, block.v, lambda w: w[rows])
    map_columns(tensors, block.o, lambda w: w[:, inputs])


def _mlp(name: str, block: MlpBlock, order: Tensor, tensors: Tensors) -> None:
    size = block.down.in_features
    per_expert = block.down.experts > 0 and order.dim() == 2
    _check(name, order, (block.down.experts, size) if per_expert else (size,))
    order = order.to(tensors[block.down.weight].device)
    for ref in (block.gate, block.up):
        if ref is not None:
            map_rows(tensors, ref, lambda w: _take(w, order, -2))
    map_columns(tensors, block.down, lambda w: _take(w, order, -1))


def _take(w: Tensor, order: Tensor, dim: int) -> Tensor:
    """Channels of `w` [.., rows, columns] in a new order; its own per expert if order is 2-D."""
    index = order.unsqueeze(-1 if dim == -2 else -2)
    shape = list(w.shape)
    return w.gather(dim, index.expand(shape))
