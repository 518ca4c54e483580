"""What a kernel file must provide: a template, how a spec binds it, and which tiles it may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from qoqc.runtime.device import DeviceKey


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile choice: constexprs as (name, value) pairs, and the launch options of Triton."""

    constexprs: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, name: str) -> int:
        """The value of one constexpr."""
        return dict(self.constexprs)[name]


class Launch(Protocol):
    """What a launcher calls: a Kernel, or a recorder of its arguments in tests."""

    @property
    def tile(self) -> Tile:
        """The tile that the grid must fit."""

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launch with the template's arguments, constexprs left out."""


Trial = Callable[[Launch], tuple[torch.Tensor, ...]]
"""Runs a kernel on data of its own and returns what the kernel wrote."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A kernel family: one template that covers every spec of one op.

    name         file stem of generated kernels and key of the tuning table
    template     the `@triton.jit` function
    bind         (spec, tile) -> every constexpr of the template, by name
    heuristic    (spec, size, device) -> a tile that is always legal; size = tokens of the launch
    candidates   (spec, size, device) -> tiles worth timing, the heuristic's among them
    selfcheck    source of `main()` in the generated file: compares with torch, then times itself;
                 it finds the spec and tile of the file in the dicts SPEC and TILE
    trial        (spec, size, torch device) -> Trial, what the tuner checks and times a tile with
    shared_bytes (spec, tile) -> estimate of the shared memory a block takes, to prune candidates
    tolerance    by how much two tiles may differ, relative to the largest |result|; 0 = not one bit
    fp_fusion    let the compiler contract a*b+c; off where results must equal torch bit for bit
    """

    name: str
    template: Any
    bind: Callable[[Any, Tile], dict[str, Any]]
    heuristic: Callable[[Any, int, DeviceKey], Tile]
    candidates: Callable[[Any, int, DeviceKey], Sequence[Tile]]
    selfcheck: str
    trial: Callable[[Any, int, torch.device], Trial] | None = None
    shared_bytes: Callable[[Any, Tile], int] | None = None
    tolerance: float = 0.0
    fp_fusion: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A built kernel. Call it with the grid and the template's arguments, constexprs left out."""

    fn: Any
    tile: Tile
    path: Path
    source: str
    fp_fusion: bool = False

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launch on the current device and stream (or run now, where Triton interprets)."""
        self.fn[grid](
            *args,
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
            enable_fp_fusion=self.fp_fusion,
        )
