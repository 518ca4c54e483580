"""Specs: frozen, hashable descriptions of what a quantized node computes. One spec, one kernel."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

GROUP = 128
"""Input channels per level-2 group and per weight tile (QServe paper, section 4.1: g128)."""

TILE_N = 128
"""Output channels per weight tile."""

PAGE = 64
"""Tokens per KV page."""

LEVEL1_MAX = 119
"""Protective range of level 1: the largest |int8| that a level-2 round trip keeps in int8."""

OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Activation dtypes the quantized ops give back."""


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """A dequantizing GEMM `y[M, N] = deq(xq[M, K]) @ deq(w[N, K]).T (+ bias) (+ residual)`.

    With `glu` the rows of w are gate and up in turn (quant/glu.py), and what comes out is
    silu(gate) * up, [M, N / 2]; no residual then.
    """

    in_features: int
    out_features: int
    group_size: Literal[128, -1]
    dtype: torch.dtype
    has_bias: bool = False
    has_residual: bool = False
    glu: bool = False


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """The format of one layer's KV cache."""

    kv_heads: int
    k_dim: int
    v_dim: int
    bits: Literal[4, 8] = 4


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Attention of `q[B, heads, S, k_dim]` over the pages of a `kv` cache."""

    heads: int
    kv: KVSpec
    dtype: torch.dtype
    has_mask: bool = False
    has_chunk: bool = False
    causal: bool = False
    has_softcap: bool = False
    has_sinks: bool = False
    has_window: bool = False


def to_json(spec: Any) -> dict[str, Any]:
    """A spec as plain JSON values; dtypes by name."""
    return {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for key, value in _flatten(dataclasses.asdict(spec)).items()
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
