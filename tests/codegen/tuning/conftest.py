"""What the tests of the tuner share: a table of their own, an op with four tiles, a fake clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.codegen.family import Family, Op, Tile, single
from qoqc.codegen.kernels.quantize import QUANTIZE, QuantizeSpec, tile_of
from qoqc.codegen.tuning import table as tables
from qoqc.runtime.device import device_key

SPEC = QuantizeSpec(40, torch.float32)
DEVICE = device_key(torch.device("cpu"))
TILES = tuple(tile_of(40, values, 1, DEVICE) for values in (64, 128, 256, 512))


class Clock:
    """A timer that runs each candidate once and gives the next of `times`."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)
        self.copies: list[int] = []

    def __call__(self, call: Callable[[int], Any], copies: int) -> float:
        call(copies - 1)
        self.copies.append(copies)
        return self.times.pop(0)


@pytest.fixture
def clock() -> type[Clock]:
    return Clock


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's table, absent so far."""
    monkeypatch.setenv("QOQC_CACHE", str(tmp_path))
    monkeypatch.setattr(tables, "_TABLES", {})
    monkeypatch.setattr(tables, "shipped", dict)
    return tmp_path / "tuning.json"


@pytest.fixture
def spec() -> QuantizeSpec:
    return SPEC


@pytest.fixture
def tiles() -> tuple[Tile, ...]:
    return TILES


@pytest.fixture
def family() -> Family:
    return dataclasses.replace(QUANTIZE, heuristic=lambda *_: TILES[0], candidates=lambda *_: TILES)


@pytest.fixture
def op(family: Family) -> Op:
    return single(family)


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes this process forget the user's table, as a new one would."""
    return lambda: monkeypatch.setattr(tables, "_TABLES", {})
