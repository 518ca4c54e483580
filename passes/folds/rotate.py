"""Rotation of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from qoqc.passes.context import Refusal
from qoqc.passes.folds.norms import gain
from qoqc.passes.folds.orthogonal import fixing_ones, orthogonal
from qoqc.passes.folds.tensors import FoldResult, Tensors, map_columns, map_rows
from qoqc.passes.structure.facts import ModelStructure, NormRef

NAME = "residual stream"


def rotate(structure: ModelStructure, tensors: Tensors, seed: int | None = 0) -> FoldResult:
    """Rotate the residual stream by one orthogonal Q (paper 4.3.1); norms must be folded before.

        x = E[t];    y = W n(x);       x = x + V z + c
          ->  x' = Q x:  E Q^T;  W Q^T;  Q V, Q c

    An RMSNorm commutes with every Q; a LayerNorm with those that fix the vector of ones, which are
    taken then, and its bias b becomes Q b. `seed` as in orthogonal().
    """
    reason = _refusal(structure, tensors)
    if reason is not None:
        return FoldResult((), (Refusal(NAME, reason),))
    stream = structure.stream
    q = orthogonal(stream.width, seed)
    norms = _norms(structure)
    if any(norm.kind == "layer" for norm in norms):
        q = fixing_ones(q)
    for name in stream.embeddings:
        tensors[name].copy_(tensors[name] @ _like(q, tensors[name]).t())
    readers = [ref for consumer in stream.consumers for ref in consumer.linears]
    assert stream.head is not None, "refused above"
    for ref in (*readers, stream.head):
        map_columns(tensors, ref, lambda w: w @ _like(q, w).t())
    for producer in stream.producers:
        map_rows(tensors, producer.linear, lambda w: _like(q, w) @ w)
    for norm in norms:
        if norm.bias is not None:
            tensors[norm.bias].copy_(_like(q, tensors[norm.bias]) @ tensors[norm.bias])
    return FoldResult((NAME,), ())


def _like(q: Tensor, tensor: Tensor) -> Tensor:
    return q.to(tensor)


def _norms(structure: ModelStructure) -> list[NormRef]:
    """The norms that read the stream."""
    stream = structure.stream
    found = [consumer.norm for consumer in stream.consumers]
    found.append(stream.final_norm)
    return [norm for norm in found if norm is not None]


def _refusal(structure: ModelStructure, tensors: Tensors) -> str | None:
    stream = structure.stream
    if stream.problems:
        return f"not understood: {stream.problems[0]}"
    if stream.head is None or not stream.embeddings:
        return "its beginning or its end was not found"
    if stream.tied:
        return "the output head is tied to the embedding; untie it first"
    if stream.stream_norms:
        name = stream.stream_norms[0].weight or "a norm without weights"
        return f"it goes through {name}"
    post = next((p.post_norm for p in stream.producers if p.post_norm is not None), None)
    if post is not None:
        return f"{post.weight} normalizes what is added to it, channel by channel (post-norm)"
    sizes = {tensors[name].shape[-1] for name in stream.embeddings}
    if sizes != {stream.width}:
        return f"embeddings of {sorted(sizes)} channels for a stream of {stream.width}"
    for norm in _norms(structure):
        scale = gain(norm, tensors)
        if scale is not None and not torch.equal(scale, torch.ones_like(scale)):
            return f"{norm.weight} is not folded"
    return None
