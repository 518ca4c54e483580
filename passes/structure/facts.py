"""The facts about a model, as parameter names and integers: frozen, and free of graph nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Runs = tuple[tuple[int, int], ...]
"""A list of row or column numbers in order, as half-open ranges: ((0, 4), (8, 12))."""


def runs_of(index: Sequence[int]) -> Runs:
    """The ranges that spell out `index`, in its order."""
    runs: list[tuple[int, int]] = []
    for i in index:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return tuple(runs)


def index_of(runs: Runs) -> Tensor:
    """The numbers that `runs` spells out, int64."""
    return torch.cat([torch.arange(start, stop) for start, stop in runs])


@dataclasses.dataclass(frozen=True)
class LinearRef:
    """Some rows of a weight, or all: the weight is [rows, in], or [in, rows] if `transposed`.

    weight, bias    names of the parameters; several LinearRefs may share a fused weight
    rows            which rows, in the order of the channels they make
    parameter_rows  rows of the whole weight
    experts         0, or E of a weight [E, rows, in]
    """

    weight: str
    bias: str | None
    in_features: int
    parameter_rows: int
    rows: Runs
    transposed: bool = False
    experts: int = 0

    @property
    def out_features(self) -> int:
        """The number of channels these rows make."""
        return sum(stop - start for start, stop in self.rows)

    @property
    def is_whole(self) -> bool:
        """Are these all rows of the weight, in order?"""
        return self.rows == ((0, self.parameter_rows),)

    def index(self) -> Tensor:
        """The row numbers, int64 [out_features]."""
        return index_of(self.rows)


def are_disjoint(refs: Sequence[LinearRef]) -> bool:
    """Is no row of a weight in two of them, or twice in one?"""
    rows = [(ref.weight, row) for ref in refs for row in ref.index().tolist()]
    return len(set(rows)) == len(rows)


@dataclasses.dataclass(frozen=True)
class NormRef:
    """y = (offset + weight) * normalized(x) + bias; a missing weight is all ones.

    kind "rms" divides by the root mean square, "layer" subtracts the mean first; over the last
    dimension. `shape` is the weight's: of two dimensions if every head has weights of its own.
    """

    weight: str | None
    bias: str | None
    kind: Literal["rms", "layer"]
    offset: float
    eps: float
    shape: tuple[int, ...]
    width: int


@dataclasses.dataclass(frozen=True)
class HeadNorm:
    """A norm on queries or keys: channel d of head h takes weight `index()[h, d]`.

    spans_heads: the mean runs over all heads together (OLMo 2), not over each.
    """

    norm: NormRef
    channels: Runs
    heads: int
    spans_heads: bool

    def index(self) -> Tensor:
        """Position in the flat norm weight, int64 [heads, head_dim]."""
        return index_of(self.channels).view(self.heads, -1)


@dataclasses.dataclass(frozen=True)
class AttentionBlock:
    """One attention. Rows of q, k, v are ordered [head, channel].

    kv_of     the key/value head of each query head
    partner   per channel of a head the channel RoPE turns it with; itself where it does not turn
    columns   the column of o that reads [head, channel], flat
    """

    q: LinearRef
    k: LinearRef
    v: LinearRef
    o: LinearRef
    columns: Runs
    norm: NormRef | None
    post_norm: NormRef | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    kv_of: tuple[int, ...]
    rope: Literal["none", "half", "interleaved", "other"]
    rotary_dim: int
    partner: tuple[int, ...]
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    v_norm: HeadNorm | None = None
    softcap: float | None = None
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class MlpBlock:
    """down(activation(gate) * up), or down(activation(up)) without a gate.

    Row i of gate and up makes input column i of down. Experts are 3-D weights; `router` chooses.
    """

    gate: LinearRef | None
    up: LinearRef
    down: LinearRef
    activation: str
    norm: NormRef | None
    post_norm: NormRef | None
    router: LinearRef | None = None


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Linears that read the residual stream, through `norm` if there is one."""

    norm: NormRef | None
    linears: tuple[LinearRef, ...]


@dataclasses.dataclass(frozen=True)
class Producer:
    """A linear that adds to the residual stream, through `post_norm` if there is one."""

    linear: LinearRef
    post_norm: NormRef | None


@dataclasses.dataclass(frozen=True)
class ResidualStream:
    """What is written into the hidden state and what reads it.

    embeddings    names of tables that start it: tokens, learned positions
    stream_norms  norms that the stream itself passes through (after the embedding, between layers)
    multipliers   numbers it or a branch is multiplied by on the way
    problems      uses that were not understood: with one, nobody may rewrite the stream
    """

    width: int
    embeddings: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    producers: tuple[Producer, ...]
    stream_norms: tuple[NormRef, ...]
    final_norm: NormRef | None
    head: LinearRef | None
    tied: bool
    multipliers: tuple[float, ...]
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """An attention and what follows it up to the next: one MLP, or routed and shared experts.

    name      the common path of its parameters: `model.layers.3`
    parallel  attention and MLP read the same state and add side by side
    """

    name: str
    attention: AttentionBlock | None
    mlps: tuple[MlpBlock, ...]
    parallel: bool


@dataclasses.dataclass(frozen=True)
class ModelStructure:
    """All facts about a model; `problems` names what was not recognised, with the reason."""

    stream: ResidualStream
    layers: tuple[Layer, ...]
    problems: tuple[str, ...]
