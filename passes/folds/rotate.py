"""Rotation of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    kept = [name for name, scale in _gains(structure, tensors) if not _is_one(scale)]
    reason = rotation_refusal(structure, tensors, kept)
    if reason is not None:
        return FoldResult((), (Refusal(NAME, reason),))
    turn(structure, tensors, rotation(structure, seed))
    return FoldResult((NAME,), ())


def rotation(structure: ModelStructure, seed: int | None = 0) -> Tensor:
    """The Q that rotate() takes, fp64 [width, width]."""
    q = orthogonal(structure.stream.width, seed)
    layered = any(norm.kind == "layer" for norm in _norms(structure))
    return fixing_ones(q) if layered else q


def turn(structure: ModelStructure, tensors: Tensors, q: Tensor) -> None:
    """Rotate by `q` what `structure`, which may be a part of the model's, has of the stream."""
    stream = structure.stream
    for name in stream.embeddings:
        tensors[name].copy_(tensors[name] @ _like(q, tensors[name]).t())
    readers = [ref for consumer in stream.consumers for ref in consumer.linears]
    for ref in (*readers, *(() if stream.head is None else (stream.head,))):
        map_columns(tensors, ref, lambda w: w @ _like(q, w).t())
    for producer in stream.producers:
        map_rows(tensors, producer.linear, lambda w: _like(q, w) @ w)
    for norm in _norms(structure):
        if norm.bias is not None:
            tensors[norm.bias].copy_(_like(q, tensors[norm.bias]) @ tensors[norm.bias])


def _like(q: Tensor, tensor: Tensor) -> Tensor:
    return q.to(tensor)


def _norms(structure: ModelStructure) -> list[NormRef]:
    """The norms that read the stream."""
    stream = structure.stream
    found = [consumer.norm for consumer in stream.consumers]
    found.append(stream.final_norm)
    return [norm for norm in found if norm is not None]


def _gains(structure: ModelStructure, tensors: Tensors) -> list[tuple[str, Tensor]]:
    """What the norms that read the stream multiply by, by the name of their weight."""
    found = [(norm.weight, gain(norm, tensors)) for norm in _norms(structure)]
    return [(name, scale) for name, scale in found if name is not None and scale is not None]


def _is_one(scale: Tensor) -> bool:
    return torch.equal(scale, torch.ones_like(scale))


def rotation_refusal(
    structure: ModelStructure, tensors: Mapping[str, Tensor], kept: Sequence[str]
) -> str | None:
    """Why the stream cannot be rotated; None if it can.

    tensors  read for the shapes of the embeddings alone
    kept     weights of norms that are not folded
    """
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
    return f"{kept[0]} is not folded" if kept else None
