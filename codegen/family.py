"""What a kernel file must provide: a template, how a spec binds it, and which tiles it may take."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from qoqc.codegen.launcher import Launcher
from qoqc.codegen.roofline import Work
from qoqc.ir.spec import to_json
from qoqc.log import get_logger
from qoqc.runtime.device import DeviceKey

log = get_logger("codegen")


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile choice: constexprs as (name, value) pairs, and the launch options of Triton."""

    constexprs: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, name: str) -> int:
        """The value of one constexpr."""
        return self._values[name]

    @functools.cached_property
    def _values(self) -> dict[str, int]:
        return dict(self.constexprs)


class Launch(Protocol):
    """What a launcher calls: a Kernel, or a recorder of its arguments in tests."""

    @property
    def tile(self) -> Tile:
        """The tile that the grid must fit."""

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launch with the template's arguments, constexprs left out."""


Trial = Callable[[Launch], tuple[torch.Tensor, ...]]
"""Runs a kernel on data of its own and returns what the kernel wrote."""


class TwinTrial(abc.ABC):
    """A Trial that knows what its op's definition gives, and can keep its weights out of L2."""

    @abc.abstractmethod
    def __call__(self, kernel: Launch, copy: int = 0) -> tuple[torch.Tensor, ...]:
        """Run on weights number `copy`: for all the same result, in the same tensors."""

    @abc.abstractmethod
    def clear(self) -> None:
        """Spoil the tensors of results, so that one that is not written cannot pass for right."""

    @abc.abstractmethod
    def expected(self) -> tuple[torch.Tensor, ...]:
        """What the definition (qoqc/ir) gives on the same data, for the rows of `sample`."""

    @abc.abstractmethod
    def sample(self, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The rows of a result that are compared."""

    @property
    @abc.abstractmethod
    def cold_bytes(self) -> int:
        """Bytes of one copy of the weights."""

    @abc.abstractmethod
    def rotate(self, copies: int) -> None:
        """Have weights number 0 to `copies` - 1."""


def never(spec: Any, device: DeviceKey) -> str | None:
    """The `refuses` of a family that runs everywhere."""
    return None


@dataclasses.dataclass(frozen=True)
class Family:
    """A kernel family: one template. It covers every spec of an op, or is one of the op's forms.

    name         file stem of generated kernels; what the tuning table calls the form
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
    start        launcher of one of several forms, called by the launcher of the op
    refuses      (spec, device) -> why this form cannot run there, or None
    work         (spec, tile, device) -> bytes and operations by token count, to prune candidates
    pdl          the kernel waits for the one before by itself (griddepcontrol), so that its blocks
                 may start while that one ends
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
    start: Callable[..., None] | None = None
    refuses: Callable[[Any, DeviceKey], str | None] = never
    work: Callable[[Any, Tile, DeviceKey], Work] | None = None
    pdl: bool = False

    def options(self, tile: Tile) -> dict[str, Any]:
        """The compile options of the family's kernels with this tile.

        A constexpr MAX_REGISTERS of a tile is one of them: a limit per thread, 0 for none.
        """
        chosen = dict(tile.constexprs)
        registers = chosen.get("MAX_REGISTERS", 0)
        # families of several archs say by this constexpr whether theirs has it
        pdl = self.pdl and chosen.get("DEPENDENT", 1)
        return {
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            "enable_fp_fusion": self.fp_fusion,
            **({"launch_pdl": True} if pdl else {}),
            **({"maxnreg": registers} if registers else {}),
        }


@dataclasses.dataclass(frozen=True)
class Op:
    """What the tuner chooses for: an op and the forms of kernel that compute it.

    name        key of the tuning table
    forms       families that give the same result, bit for bit
    heuristic   (spec, size, device) -> a form that does not refuse, with a tile that is legal
    table_spec  spec -> JSON values of the part of it that a choice depends on
    timed       spec -> the one to search with, of those that share its entry
    """

    name: str
    forms: tuple[Family, ...]
    heuristic: Callable[[Any, int, DeviceKey], tuple[Family, Tile]]
    table_spec: Callable[[Any], dict[str, Any]]
    timed: Callable[[Any], Any] = lambda spec: spec

    def usable(self, spec: Any, device: DeviceKey) -> list[Family]:
        """The forms that run there; why another does not is logged once."""
        kept = []
        for form in self.forms:
            reason = form.refuses(spec, device)
            if reason is None:
                kept.append(form)
            else:
                _log_refusal(form.name, reason)
        return kept


def single(family: Family) -> Op:
    """The op of a family that is the only form of its kernel; named after the family."""

    def heuristic(spec: Any, size: int, device: DeviceKey) -> tuple[Family, Tile]:
        return family, family.heuristic(spec, size, device)

    return Op(family.name, (family,), heuristic, to_json)


@functools.cache
def _log_refusal(form: str, reason: str) -> None:
    log.info("%s is not used: %s", form, reason)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A built kernel. Call it with the grid and the template's arguments, constexprs left out."""

    fn: Any
    tile: Tile
    path: Path
    source: str
    family: Family

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launch on the current device and stream (or run now, where Triton interprets)."""
        self._launcher(grid, args)

    @functools.cached_property
    def _launcher(self) -> Launcher:
        return Launcher(self.fn, self.family.options(self.tile))
