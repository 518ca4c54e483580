from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.codegen import tune
from qoqc.codegen.family import Family, Tile
from qoqc.codegen.kernels.gemm_w4a8 import GEMM_W4A8
from qoqc.codegen.kernels.quantize import QUANTIZE, QuantizeSpec, tile_of
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey, device_key

SPEC = QuantizeSpec(40, torch.float32)
TILES = tuple(tile_of(40, values, 1) for values in (64, 128, 256, 512))


class Clock:
    """A timer that runs each candidate once and gives the next of `times`."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        return self.times.pop(0)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QOQC_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "_TABLES", {})
    return tmp_path / "tuning.json"


@pytest.fixture
def family() -> Family:
    return dataclasses.replace(QUANTIZE, heuristic=lambda *_: TILES[0], candidates=lambda *_: TILES)


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes this process forget the table, as a new one would."""
    return lambda: monkeypatch.setattr(tune, "_TABLES", {})


def test_buckets() -> None:
    assert [tune.bucket(n) for n in (0, 1, 2, 3, 17, 4097, 100_000)] == [1, 1, 2, 4, 32, 8192, 8192]


def test_heuristic_mode_times_nothing(family: Family, table: Path, device: torch.device) -> None:
    assert tune.choose(family, SPEC, 9, device, "heuristic", Clock()) == TILES[0]
    assert not table.exists()


def test_the_fastest_wins_and_is_remembered(
    family: Family, table: Path, device: torch.device, forget: Callable[[], None]
) -> None:
    assert tune.choose(family, SPEC, 9, device, "search", Clock(4, 3, 1, 2)) == TILES[2]
    for _ in range(2):
        # 9 and 16 tokens share a bucket; an empty clock would raise if anything were timed
        assert tune.choose(family, SPEC, 16, device, "search", Clock()) == TILES[2]
        forget()
    (winner,) = json.loads(table.read_text())["winners"]
    assert winner["family"] == "quantize"
    assert winner["size"] == 16
    assert winner["spec"] == {"features": 40, "dtype": "float32"}
    assert winner["device"]["name"] == device_key(device).name
    assert winner["tile"]["constexprs"] == dict(TILES[2].constexprs)
    assert tune.choose(family, SPEC, 17, device, "search", Clock(1, 2, 3, 4)) == TILES[0]
    assert len(json.loads(table.read_text())["winners"]) == 2


def test_an_edited_table_is_obeyed_while_legal(
    family: Family, table: Path, device: torch.device, forget: Callable[[], None]
) -> None:
    tune.choose(family, SPEC, 9, device, "search", Clock(4, 3, 1, 2))
    text = json.loads(table.read_text())
    for rows, wanted in ((TILES[1]["ROWS"], TILES[1]), (999, TILES[0])):
        text["winners"][0]["tile"]["constexprs"]["ROWS"] = rows
        table.write_text(json.dumps(text))
        forget()
        assert tune.choose(family, SPEC, 9, device, "search", Clock(1, 2, 3, 4)) == wanted


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 0, "winners": []}',
        b'{"version": 1, "winners": [{"family": "quantize"}]}',
        b'{"version": 1, "winners": [3]}',
        b'{"version": 1, "winners": 3}',
    ],
)
def test_a_damaged_table_is_ignored_with_one_warning(
    content: bytes,
    family: Family,
    table: Path,
    device: torch.device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    table.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="qoqc"):
        assert tune.choose(family, SPEC, 9, device, "search", Clock(4, 3, 2, 1)) == TILES[3]
        assert tune.choose(family, SPEC, 9, device, "search", Clock()) == TILES[3]
    assert sum("tuning.json is ignored" in r.getMessage() for r in caplog.records) == 1
    assert len(json.loads(table.read_text())["winners"]) == 1


def test_winners_of_other_processes_are_kept(
    family: Family, table: Path, device: torch.device, forget: Callable[[], None]
) -> None:
    tune.choose(family, SPEC, 1, device, "search", Clock(1, 2, 3, 4))
    ours = dict(tune._TABLES)
    forget()
    tune.choose(family, SPEC, 2, device, "search", Clock(1, 2, 3, 4))
    tune._TABLES.update({path: {} for path in ours})
    tune.choose(family, SPEC, 4, device, "search", Clock(1, 2, 3, 4))
    sizes = [entry["size"] for entry in json.loads(table.read_text())["winners"]]
    assert sorted(sizes) == [1, 2, 4]
    assert [path.name for path in table.parent.glob("tuning*.tmp")] == []


def test_a_wrong_candidate_cannot_win(
    family: Family, table: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    assert family.trial is not None
    genuine = family.trial

    def trial(*args: Any) -> Any:
        run = genuine(*args)

        def spoilt(kernel: Any) -> tuple[torch.Tensor, ...]:
            xq, scale, total = run(kernel)
            if kernel.tile == TILES[1]:
                xq[0, 0] ^= 1
            return xq, scale, total

        return spoilt

    spoilt = dataclasses.replace(family, trial=trial)
    with caplog.at_level(logging.WARNING, logger="qoqc"):
        assert tune.choose(spoilt, SPEC, 9, device, "search", Clock(4, 3, 2)) == TILES[3]
    assert "gives other results" in caplog.text


def test_a_candidate_that_fails_is_dropped(
    family: Family, table: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Tile((("ROWS", 3), ("BLOCK_K", 64), ("LOOP", 0)), num_warps=1)  # not a power of two
    family = dataclasses.replace(family, candidates=lambda *_: (TILES[0], broken, TILES[1]))
    with caplog.at_level(logging.WARNING, logger="qoqc"):
        assert tune.choose(family, SPEC, 9, device, "search", Clock(2, 1)) == TILES[1]
    assert "failed and is not considered" in caplog.text


def test_candidates_beyond_shared_memory_are_not_built(
    family: Family, table: Path, device: torch.device
) -> None:
    greedy = dataclasses.replace(
        family, shared_bytes=lambda spec, tile: 0 if tile == TILES[1] else 1 << 30
    )
    assert tune.choose(greedy, SPEC, 9, device, "search", Clock(2, 1)) == TILES[1]


def test_a_family_without_a_trial_keeps_its_heuristic(
    family: Family, table: Path, device: torch.device
) -> None:
    mute = dataclasses.replace(family, trial=None)
    assert tune.choose(mute, SPEC, 9, device, "search", Clock()) == TILES[0]


def test_tolerance() -> None:
    a = torch.tensor([1.0, -4.0])
    assert not tune._agree(a, a + 1e-3, 0.0)
    assert tune._agree(a, a + 1e-3, 1e-3)
    assert not tune._agree(a, a + 5e-3, 1e-3)
    assert tune._agree(torch.tensor(torch.nan), torch.tensor(torch.nan), 0.0)


def test_search_of_a_gemm(table: Path, device: torch.device) -> None:
    spec = LinearSpec(128, 64, 128, torch.bfloat16)
    family = dataclasses.replace(
        GEMM_W4A8, candidates=lambda *args: GEMM_W4A8.candidates(*args)[:3]
    )
    tiles = family.candidates(spec, 2, device_key(device))
    assert tune.choose(family, spec, 2, device, "search", Clock(3, 2, 1)) == tiles[2]


@pytest.mark.gpu
def test_search_on_the_device(table: Path, device: torch.device) -> None:
    spec = LinearSpec(4096, 4096, 128, torch.bfloat16)
    found = tune.choose(GEMM_W4A8, spec, 16, device, "search")
    assert found in GEMM_W4A8.candidates(spec, 16, device_key(device))
    assert tune.choose(GEMM_W4A8, spec, 16, device, "search", Clock()) == found


def test_the_key_tells_devices_apart() -> None:
    a, b = (DeviceKey("H200", 90, sms, 232448) for sms in (132, 114))
    assert tune.entry_key(QUANTIZE, SPEC, 1, a) != tune.entry_key(QUANTIZE, SPEC, 1, b)
