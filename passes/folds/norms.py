"""Norm weights move into the linears behind the norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qoqc.passes.context import Refusal
from qoqc.passes.folds.tensors import FoldResult, Tensors, map_columns, matrix
from qoqc.passes.structure.facts import LinearRef, ModelStructure, NormRef

TINY = 1e-6
"""Of the largest norm weight: dividing a bias by less would make it an outlier of its own."""


def norms(structure: ModelStructure, tensors: Tensors) -> FoldResult:
    """Fold the weight of every norm of the stream into what reads it (paper 4.3.1).

        y = W (g * n(x) + b) + c   ->   y = (W g) n(x) + (c + W b)

    The norm's weight becomes the identity (0 where the model adds 1 to it). A LayerNorm bias goes
    into the biases of the linears; where one has none, it stays in the norm as b / g.
    """
    stream = structure.stream
    groups = [(c.norm, c.linears) for c in stream.consumers if c.norm is not None]
    if stream.final_norm is not None and stream.head is not None:
        groups.append((stream.final_norm, (stream.head,)))
    uses = Counter(norm.weight or norm.bias for norm, _ in groups)
    applied, refused = [], []
    for norm, linears in groups:
        name = norm.weight or norm.bias
        if name is None:  # nothing to fold
            continue
        reason = _refusal(structure, norm, linears, uses[name])
        reason = reason or _fold(norm, linears, tensors)
        if reason is None:
            applied.append(name)
        else:
            refused.append(Refusal(name, reason))
    return FoldResult(tuple(applied), tuple(refused))


def gain(norm: NormRef, tensors: Tensors) -> Tensor | None:
    """What the norm multiplies by: weight + offset [width]; None if it has no weight."""
    return None if norm.weight is None else tensors[norm.weight] + norm.offset


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


def _fold(norm: NormRef, linears: Sequence[LinearRef], tensors: Tensors) -> str | None:
    """Fold one norm; a reason if its bias cannot be kept."""
    scale = gain(norm, tensors)
    bias = None if norm.bias is None else tensors[norm.bias]
    if bias is not None and bool(bias.any()):
        if all(ref.bias is not None for ref in linears):
            for ref in linears:
                assert ref.bias is not None, "checked above"
                tensors[ref.bias] += matrix(tensors, ref) @ bias
            bias.zero_()
        elif scale is not None:
            if float(scale.abs().min()) <= TINY * float(scale.abs().max()):
                return "a linear behind it has no bias, and its bias / weight is too large to keep"
            bias /= scale
    if scale is not None and norm.weight is not None:
        for ref in linears:
            map_columns(tensors, ref, lambda w: w * scale)
        tensors[norm.weight].copy_(torch.ones_like(scale) - norm.offset)
    return None
