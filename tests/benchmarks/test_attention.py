from __future__ import annotations

import csv
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.ir import kv_reference

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(FOLDER)  # as `python benchmarks/NAME.py` has it
    return runpy.run_path(str(FOLDER / f"{name}.py"))


def test_a_quick_run_on_this_machine(
    tmp_path: Path,
    device: torch.device,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = load("attention", monkeypatch)
    where = ["--device", device.type, "--out", str(tmp_path), "--quick"]
    script["main"]([*where, "--rivals", "flash"])
    with (tmp_path / "attention.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {kind: [r["what"] for r in rows if r["kind"] == kind] for kind in script["KINDS"]}
    assert kinds == {
        "decode": ["kv4", "flash"],
        "ragged": ["kv4", "kv4, equal lengths", "flash"],
        "prefill": ["kv4", "flash"],
        "chunked": ["kv4", "flash"],
    }
    for row in rows:
        assert float(row["us"]) > 0
        assert row["note"] == ""
        assert row["torch"] == torch.__version__
        if row["what"].startswith("kv4") and row["new"] == "1":
            assert 0 < float(row["ceiling"]) < 1
    printed = capfd.readouterr().out
    assert "slower than a rival: " in printed
    assert "equal lengths of the same sum" in printed


def test_rivals_that_are_not_reached_have_a_note(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("attention", monkeypatch)
    where = ["--device", device.type, "--out", str(tmp_path), "--quick", "--seconds", "0"]
    script["main"]([*where, "--kinds", "decode", "--rivals", "flash", "flex"])
    with (tmp_path / "attention.csv").open(newline="") as file:
        ours, *rivals = csv.DictReader(file)
    assert float(ours["us"]) > 0
    assert [row["what"] for row in rivals] == ["flash", "flex"]
    assert all((row["us"], row["note"]) == ("nan", "not timed within 0 s") for row in rivals)


def test_a_wrong_result_is_told_and_ends_in_an_error(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("attention", monkeypatch)
    definition = kv_reference.kv_dequant

    def other(*args: Any) -> Any:
        keys, values = definition(*args)
        return keys, 2 * values

    monkeypatch.setattr(kv_reference, "kv_dequant", other)  # what a prompt is compared with
    where = ["--device", device.type, "--out", str(tmp_path), "--quick", "--kinds", "prefill"]
    with pytest.raises(SystemExit, match="1 results are wrong: .*relative error"):
        script["main"]([*where, "--rivals"])
    with (tmp_path / "attention.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["us"] == "nan"
    assert row["note"].startswith("wrong: relative error")


def test_bytes_of_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = load("attention_calls", monkeypatch)["Point"]("decode", 2, 1, 101)
    # 64 bytes of keys, 64 of values and two words per token and KV head
    assert point.cached_bytes == 2 * 101 * 8 * 136
    assert point.read_bytes == 2 * 100 * 8 * 136 + 2 * (32 + 16) * 128 * 2


def test_a_rival_that_fails_has_a_note(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals = load("attention_rivals", monkeypatch)
    point = load("attention_calls", monkeypatch)["Point"]("decode", 1, 1, 8)

    def broken(*args: Any) -> Any:
        raise NotImplementedError("not on\nthis machine")

    monkeypatch.setitem(rivals["RIVALS"], "flash", broken)
    row = rivals["rival_row"]("flash", point, device)
    assert math.isnan(row["us"])
    assert row["note"] == "not available: NotImplementedError: not on"


def test_losses_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    reporting = load("attention_report", monkeypatch)
    base = {"kind": "decode", "batch": 4, "new": 1, "context": 64, "note": ""}
    numbers = {"tbs": 1.0, "ceiling": 0.2}
    rows = [
        {**base, **numbers, "what": "kv4", "us": 10.0, "ratio": 1.0},
        {**base, **numbers, "what": "cudnn", "us": 8.0, "ratio": 0.8},
        {**base, **numbers, "what": "flash", "us": 12.0, "ratio": 1.2},
    ]
    assert reporting["losses"](rows) == ["decode B=4 new=1 context=64: cudnn x0.80"]
    *_, last = reporting["report"](rows)
    assert last == "slower than a rival: decode B=4 new=1 context=64: cudnn x0.80"
