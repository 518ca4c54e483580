"""Rotation between v and o, head by head."""

from __future__ import annotations

from torch import Tensor

from qoqc.passes.context import Refusal
from qoqc.passes.folds.orthogonal import orthogonal
from qoqc.passes.folds.tensors import FoldResult, Tensors, attentions, map_columns, map_rows
from qoqc.passes.structure.facts import AttentionBlock, ModelStructure, index_of


def rotate_values(structure: ModelStructure, tensors: Tensors) -> FoldResult:
    """Rotate each value head by a Hadamard matrix R, and back in front of o.

        a = P (V x + c);   y = O a   ->   a' = R a = P (R V x + R c);   y = (O R^T) a'

    Attention is linear in the values, so R goes through P. All query heads of a key/value head
    share it. The matrix is plain: the KV cache sees the same spread in every layer.
    """
    applied, refused = [], []
    for name, block in attentions(structure).items():
        if block.v_norm is not None:
            refused.append(Refusal(name, "the values are normalized after v"))
            continue
        _rotate(block, tensors)
        applied.append(name)
    return FoldResult(tuple(applied), tuple(refused))


def _rotate(block: AttentionBlock, tensors: Tensors) -> None:
    r = orthogonal(block.value_dim, seed=None)
    columns = index_of(block.columns)

    def rows(w: Tensor) -> Tensor:
        heads = w.reshape(block.kv_heads, block.value_dim, -1)
        return (r.to(w) @ heads).reshape(w.shape)

    def inputs(w: Tensor) -> Tensor:
        index = columns.to(w.device)
        heads = w[:, index].reshape(w.shape[0], block.heads, block.value_dim)
        w = w.clone()
        w[:, index] = (heads @ r.to(w).t()).reshape(w.shape[0], -1)
        return w

    map_rows(tensors, block.v, rows)
    map_columns(tensors, block.o, inputs)
