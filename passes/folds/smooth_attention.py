"""SmoothAttention: outlier channels of the keys move into the queries."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qoqc.passes.context import Refusal
from qoqc.passes.folds.tensors import FoldResult, Tensors, attentions, factors, map_rows
from qoqc.passes.structure.facts import AttentionBlock, HeadNorm, LinearRef, ModelStructure


def smooth_attention(
    structure: ModelStructure, tensors: Tensors, scales: Mapping[str, Tensor]
) -> FoldResult:
    """Divide keys and multiply queries by the same factors, before RoPE (paper 4.2).

        s = (Q x + a) . (K x + b)   ->   s = (l Q x + l a) . (K/l x + b/l)

    scales: weight of o -> l [kv_heads, head_dim], as `shared_maximum` shapes it: RoPE mixes a
    channel with its partner, so both need one factor. Behind a norm on queries or keys the factor
    goes into the norm's weight; where heads share that, they need the same factors.
    """
    known = attentions(structure)
    applied, refused = [], []
    for name, scale in scales.items():
        block = known.get(name)
        reason = "no recognised attention ends in it"
        if block is not None:
            shape = (block.kv_heads, block.head_dim)
            scale = factors(name, scale, tensors[block.k.weight], shape)
            reason = _refusal(block, scale) or ""
        if block is None or reason:
            refused.append(Refusal(name, reason))
            continue
        _apply(block.q, block.q_norm, scale[list(block.kv_of)], tensors)
        _apply(block.k, block.k_norm, 1 / scale, tensors)
        applied.append(name)
    return FoldResult(tuple(applied), tuple(refused))


def shared_maximum(block: AttentionBlock, values: Tensor) -> Tensor:
    """The largest of `values` [kv_heads, head_dim] over channels that must have one factor.

    These are RoPE partners and, where a norm's weights are shared by heads, all heads.
    """
    partner = torch.tensor(block.partner, device=values.device)
    if any(_shares(norm) for norm in (block.q_norm, block.k_norm)):
        values = values.amax(0, keepdim=True).expand_as(values)
    while True:
        larger = torch.maximum(values, values[:, partner])
        larger.scatter_reduce_(1, partner.expand_as(values), larger.clone(), "amax")
        if torch.equal(larger, values):
            return larger
        values = larger


def _shares(norm: HeadNorm | None) -> bool:
    return norm is not None and len(set(norm.index().flatten().tolist())) < norm.index().numel()


def _refusal(block: AttentionBlock, scale: Tensor) -> str | None:
    partner = torch.tensor(block.partner, device=scale.device)
    if not torch.equal(scale, scale[:, partner]):
        return "RoPE mixes channels that have different factors"
    for norm, per_head in ((block.q_norm, scale[list(block.kv_of)]), (block.k_norm, scale)):
        if norm is None:
            continue
        if norm.norm.weight is None:
            return "queries or keys go through a norm without weights, which undoes any factor"
        if _per_place(norm, per_head) is None:
            return f"heads share {norm.norm.weight} and have different factors"
    return None


def _per_place(norm: HeadNorm, scale: Tensor) -> Tensor | None:
    """`scale` [heads, head_dim] by position in the norm's weight; None if heads disagree."""
    index = norm.index().to(scale.device)
    found = torch.ones(torch.Size(norm.norm.shape).numel(), dtype=scale.dtype, device=scale.device)
    found[index.flatten()] = scale.flatten()
    return found if torch.equal(found[index], scale) else None


def _apply(ref: LinearRef, norm: HeadNorm | None, scale: Tensor, tensors: Tensors) -> None:
    """Multiply the channels [heads, head_dim] of queries or keys by `scale`."""
    if norm is None:
        flat = scale.reshape(-1, 1)
        map_rows(tensors, ref, lambda w: w * flat)
        return
    places = _per_place(norm, scale)
    assert places is not None and norm.norm.weight is not None, "refused before"
    weight = tensors[norm.norm.weight]
    weight.copy_((weight + norm.norm.offset) * places.view_as(weight) - norm.norm.offset)
    if norm.norm.bias is not None:
        bias = tensors[norm.norm.bias]
        bias.copy_(bias * places.view_as(bias))
