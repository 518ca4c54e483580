"""Norm weights move into the linears behind the norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qoqc.passes.context import Refusal
from qoqc.passes.folds.tensors import FoldResult, Tensors, map_columns, matrix
from qoqc.passes.structure.facts import LinearRef, ModelStructure, NormRef

TINY = 1e-6
"""Of the largest norm weight: dividing a bias by less would make it an outlier of its own."""

Group = tuple[str, NormRef, tuple[LinearRef, ...]]


def norms(structure: ModelStructure, tensors: Tensors) -> FoldResult:
    """Fold the weight of every norm of the stream into what reads it (paper 4.3.1).

        y = W (g * n(x) + b) + c   ->   y = (W g) n(x) + (c + W b)

    The norm's weight becomes the identity (0 where the model adds 1 to it). A LayerNorm bias goes
    into the biases of the linears; where one has none, it stays in the norm as b / g.
    """
    reasons = norm_refusals(structure, tensors)
    applied = fold_norms(structure, tensors, reasons)
    return FoldResult(applied, tuple(Refusal(*item) for item in reasons.items()))


def norm_refusals(structure: ModelStructure, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Norm -> why it cannot be folded. Reads of `tensors` the norms' own alone."""
    groups = _groups(structure)
    uses = Counter(name for name, _, _ in groups)
    found: dict[str, str] = {}
    for name, norm, linears in groups:
        reason = _refusal(structure, norm, linears, uses[name])
        reason = reason or _bias_refusal(norm, linears, tensors)
        if reason is not None:
            found[name] = reason
    return found


def fold_norms(
    structure: ModelStructure, tensors: Tensors, refused: Mapping[str, str]
) -> tuple[str, ...]:
    """Fold every norm of `structure`, which may be a part of the model's, but those refused."""
    groups = [group for group in _groups(structure) if group[0] not in refused]
    for _, norm, linears in groups:
        _fold(norm, linears, tensors)
    return tuple(name for name, _, _ in groups)


def gain(norm: NormRef, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What the norm multiplies by: weight + offset [width]; None if it has no weight."""
    return None if norm.weight is None else tensors[norm.weight] + norm.offset


def _groups(structure: ModelStructure) -> list[Group]:
    """The norms that have something to fold, by name, each with the linears that read it."""
    stream = structure.stream
    groups = [(c.norm, c.linears) for c in stream.consumers if c.norm is not None]
    if stream.final_norm is not None and stream.head is not None:
        groups.append((stream.final_norm, (stream.head,)))
    named = [(norm.weight or norm.bias, norm, linears) for norm, linears in groups]
    return [(name, norm, linears) for name, norm, linears in named if name is not None]


def _refusal(
    structure: ModelStructure, norm: NormRef, linears: Sequence[LinearRef], uses: int
) -> str | None:
    stream = structure.stream
    if stream.problems:
        return f"the residual stream was not understood: {stream.problems[0]}"
    if norm in stream.stream_norms:
        return "its output is the residual stream itself"
    if uses > 1:
        return f"{uses} norms share this weight"
    if stream.tied and any(ref.weight in stream.embeddings for ref in linears):
        return "the output head behind it is tied to the embedding; untie it first"
    if norm.shape != (stream.width,):
        return f"its weight has shape {list(norm.shape)}, the stream {stream.width} channels"
    return None


def _bias_refusal(
    norm: NormRef, linears: Sequence[LinearRef], tensors: Mapping[str, Tensor]
) -> str | None:
    """Why its bias can be kept neither in biases behind it nor in the norm; None if it can."""
    scale = gain(norm, tensors)
    bias = None if norm.bias is None else tensors[norm.bias]
    if bias is None or scale is None or not bool(bias.any()):
        return None
    if all(ref.bias is not None for ref in linears):
        return None
    if float(scale.abs().min()) <= TINY * float(scale.abs().max()):
        return "a linear behind it has no bias, and its bias / weight is too large to keep"
    return None


def _fold(norm: NormRef, linears: Sequence[LinearRef], tensors: Tensors) -> None:
    scale = gain(norm, tensors)
    bias = None if norm.bias is None else tensors[norm.bias]
    if bias is not None and bool(bias.any()):
        if all(ref.bias is not None for ref in linears):
            for ref in linears:
                assert ref.bias is not None, "checked above"
                tensors[ref.bias] += matrix(tensors, ref) @ bias
            bias.zero_()
        elif scale is not None:
            bias /= scale
    if scale is not None and norm.weight is not None:
        for ref in linears:
            map_columns(tensors, ref, lambda w: w * scale)
        tensors[norm.weight].copy_(torch.ones_like(scale) - norm.offset)
