"""Which tile a kernel gets: the heuristic's, or the winner of a search on the device.

Winners live in `<cache_dir>/tuning.json`, a table a person can read and edit. An entry counts only
while its tile is among the family's candidates, so an edit cannot make a kernel illegal.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from filelock import FileLock
from triton.runtime.errors import TritonError

from qoqc.codegen.build import build
from qoqc.codegen.family import Family, Tile
from qoqc.config import cache_dir
from qoqc.ir.spec import to_json
from qoqc.log import get_logger
from qoqc.runtime.device import DeviceKey, device_key

log = get_logger("tune")

Mode = Literal["heuristic", "search"]
Timer = Callable[[Callable[[], Any]], float]
"""Milliseconds of a call."""

VERSION = 1
MAX_BUCKET = 8192
_TABLES: dict[Path, dict[str, Tile]] = {}


def bucket(size: int) -> int:
    """The token count that stands for `size`: the next power of two, 8192 at most."""
    return min(MAX_BUCKET, 1 << max(0, size - 1).bit_length())


def device_timer(call: Callable[[], Any]) -> float:
    """The median milliseconds of `call` on the current CUDA device, L2 cold.

    As a CUDA graph: launching from Python takes longer than a small kernel runs.
    """
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return float(triton.testing.do_bench(graph.replay, return_mode="median"))


def choose(
    family: Family,
    spec: Any,
    size: int,
    device: torch.device,
    mode: Mode,
    timer: Timer = device_timer,
) -> Tile:
    """The tile for launches of about `size` tokens: always an answer, never an error.

    "heuristic" asks the family. "search" takes the winner of the table, and searches first where
    there is none, except while a CUDA graph is being captured.
    """
    size, key = bucket(size), device_key(device)
    default = family.heuristic(spec, size, key)
    if mode == "heuristic":
        return default
    found = _table().get(entry_key(family, spec, size, key))
    if found is not None and found in family.candidates(spec, size, key):
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return default
    winner = search(family, spec, size, device, timer)
    _record(entry_key(family, spec, size, key), winner)
    return winner


def search(
    family: Family, spec: Any, size: int, device: torch.device, timer: Timer = device_timer
) -> Tile:
    """Time every candidate that fits the device and gives the heuristic's result; the fastest.

    A candidate that fails to compile or gives another result is dropped with a warning.
    """
    key = device_key(device)
    best = family.heuristic(spec, size, key)
    if family.trial is None:
        return best
    run = family.trial(spec, size, device)
    expected = run(build(family, spec, best))
    best_time = timer(lambda: run(build(family, spec, best)))
    for tile in family.candidates(spec, size, key):
        if tile == best or not _fits(family, spec, tile, key):
            continue
        kernel = build(family, spec, tile)
        try:
            result = run(kernel)
        except (RuntimeError, TritonError) as error:
            log.warning("%s: %s failed and is not considered: %s", family.name, tile, error)
            continue
        if not all(_agree(a, b, family.tolerance) for a, b in zip(result, expected, strict=True)):
            log.warning("%s: %s gives other results and is not considered", family.name, tile)
            continue
        took = timer(lambda kernel=kernel: run(kernel))  # type: ignore[misc]
        log.debug("%s size %d %s: %.4f ms", family.name, size, tile, took)
        if took < best_time:
            best, best_time = tile, took
    return best


def _fits(family: Family, spec: Any, tile: Tile, key: DeviceKey) -> bool:
    return family.shared_bytes is None or family.shared_bytes(spec, tile) <= key.shared_bytes


def _agree(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if not tolerance:
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    bound = tolerance * b.float().abs().amax().item()
    return torch.allclose(a.float(), b.float(), rtol=0, atol=bound, equal_nan=True)


def entry_key(family: Family, spec: Any, size: int, device: DeviceKey) -> str:
    """The key of a table entry: JSON of everything the choice depends on."""
    parts = {
        "family": family.name,
        "spec": to_json(spec),
        "device": dataclasses.asdict(device),
        "size": size,
    }
    return json.dumps(parts, sort_keys=True)


def table_path() -> Path:
    """Where winners are kept."""
    return cache_dir() / "tuning.json"


def _table() -> dict[str, Tile]:
    path = table_path()
    if path not in _TABLES:
        _TABLES[path] = _read(path)
    return _TABLES[path]


def _read(path: Path, level: int = logging.WARNING) -> dict[str, Tile]:
    """The table on disk; an empty one, with a line in the log, where it is damaged or foreign."""
    try:
        raw = json.loads(path.read_bytes())
        if raw["version"] != VERSION:
            raise ValueError(f"version {raw['version']}, expected {VERSION}")
        return {
            json.dumps(
                {k: entry[k] for k in ("family", "spec", "device", "size")}, sort_keys=True
            ): (_tile(entry["tile"]))
            for entry in raw["winners"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.log(level, "%s is ignored, tiles will be searched again: %r", path, error)
        return {}


def _tile(raw: dict[str, Any]) -> Tile:
    constexprs = tuple((str(name), int(value)) for name, value in raw["constexprs"].items())
    return Tile(constexprs, int(raw["num_warps"]), int(raw["num_stages"]))


def _record(key: str, tile: Tile) -> None:
    """Add a winner to the table of every process that shares the cache directory."""
    path = table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        # read again: another process may have added to it; _table() has warned of damage
        known = _table()
        table = {**_read(path, logging.DEBUG), **known, key: tile}
        _TABLES[path] = table
        winners = [
            {
                **json.loads(name),
                "tile": {
                    "constexprs": dict(winner.constexprs),
                    "num_warps": winner.num_warps,
                    "num_stages": winner.num_stages,
                },
            }
            for name, winner in sorted(table.items())
        ]
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="tuning", suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({"version": VERSION, "winners": winners}, file, indent=1)
        os.replace(temporary, path)
