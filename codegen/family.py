"""What a kernel file must provide: a template, how a spec binds it, and which tiles it may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qoqc.runtime.device import DeviceKey


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile choice: constexprs as (name, value) pairs, and the launch options of Triton."""

    constexprs: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class Family:
    """A kernel family: one template that covers every spec of one op.

    name         file stem of generated kernels and key of the tuning table
    template     the `@triton.jit` function
    bind         (spec, tile) -> every constexpr of the template, by name
    heuristic    (spec, size, device) -> a tile that is always legal; size = tokens of the launch
    candidates   (spec, size, device) -> tiles worth timing, the heuristic's among them
    selfcheck    source of `main()` in the generated file: compares with torch, then times itself
    """

    name: str
    template: Any
    bind: Callable[[Any, Tile], dict[str, Any]]
    heuristic: Callable[[Any, int, DeviceKey], Tile]
    candidates: Callable[[Any, int, DeviceKey], Sequence[Tile]]
    selfcheck: str
