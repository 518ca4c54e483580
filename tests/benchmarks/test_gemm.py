from __future__ import annotations

import csv
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.codegen.kernels import gemm_trial
from qoqc.codegen.tuning import table as tables

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT, REPORT, PLOT = (FOLDER / f"{name}.py" for name in ("gemm", "gemm_report", "gemm_plot"))


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # as `python benchmarks/gemm.py` has it
        return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def reporting() -> dict[str, Any]:
    return runpy.run_path(str(REPORT))


def test_a_quick_run_on_this_machine(
    script: dict[str, Any], tmp_path: Path, device: torch.device, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ["--device", device.type, "--out", str(tmp_path), "--workers", "0"]
    script["main"]([*where, "--quick", "--shapes", "64x128", "--sizes", "1", "40"])
    with (tmp_path / "gemm.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    systems = {row["what"] for row in rows}
    assert len(rows) == 2 * len(systems)
    assert systems == {*script["OURS"], *script["RIVALS"]}
    for row in rows:
        assert (row["n"], row["k"]) == ("64", "128")
        assert row["torch"] == torch.__version__
        assert row["device"] and row["commit"]
        if row["what"] in script["OURS"]:
            assert float(row["us"]) > 0
            assert 0 < float(row["limit"]) < 1
            assert float(row["ratio_bf16"]) > 0
    padded = {row["m"]: row["note"] for row in rows if row["what"] == "int8 _int_mm"}
    assert padded == {"1": "padded to 32 tokens", "40": ""}
    printed = capfd.readouterr().out
    assert "slower than bf16: " in printed
    assert "slower than fp8: " in printed
    assert "int8 _int_mm: padded to 32 tokens" in printed


def test_a_wrong_result_is_told_and_ends_in_an_error(
    script: dict[str, Any],
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine = gemm_trial.GemmTrial.expected
    monkeypatch.setattr(
        gemm_trial.GemmTrial, "expected", lambda self: tuple(t + 1 for t in genuine(self))
    )
    where = ["--device", device.type, "--out", str(tmp_path), "--workers", "0"]
    with pytest.raises(SystemExit, match="2 results are wrong: .*gives other results"):
        script["main"]([*where, "--shapes", "64x128", "--sizes", "1"])
    with (tmp_path / "gemm.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["what"] in script["OURS"]]
    assert [row["us"] for row in rows] == ["nan", "nan"]


def test_what_failed_in_a_worker_is_not_run(
    script: dict[str, Any], tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = script["main"].__globals__
    monkeypatch.setitem(names, "failures", lambda prove, tasks, *_, **__: {0: "its process died"})
    where = ["--device", device.type, "--out", str(tmp_path), "--workers", "1"]
    with pytest.raises(SystemExit, match="1 results are wrong: .*its process died"):
        script["main"]([*where, "--shapes", "64x128", "--sizes", "1"])


def row(what: str, shape: tuple[int, int], m: int, us: float, **more: Any) -> dict[str, Any]:
    n, k = shape
    empty = {"ratio_bf16": math.nan, "ratio_fp8": math.nan, "limit": math.nan, "note": ""}
    return {"n": n, "k": k, "m": m, "what": what, "us": us, **empty, **more}


def test_ratios_are_to_bf16_and_to_the_faster_fp8(script: dict[str, Any]) -> None:
    shape = (4096, 4096)
    names = ("w4a8 g128", "bf16", "fp8 per tensor", "fp8 per row")
    rows = [row(what, shape, 1, us) for what, us in zip(names, (2, 6, 5, 4), strict=True)]
    script["add_ratios"](rows)
    assert (rows[0]["ratio_bf16"], rows[0]["ratio_fp8"]) == (3, 2)
    rows[3]["us"] = math.nan
    script["add_ratios"](rows)
    assert rows[0]["ratio_fp8"] == 2.5


def test_sums_hold_whole_layers_only(reporting: dict[str, Any]) -> None:
    layer = {"a": (6144, 4096), "b": (4096, 4096), "c": (28672, 4096), "d": (4096, 14336)}
    rows = [row("bf16", shape, 1, 10.0) for shape in layer.values()]
    rows += [row("bf16", layer["a"], 8, 10.0)]
    assert list(reporting["sums"](rows, "llama-3-8b")) == [(1, {"bf16": 40.0})]


def test_every_lost_point_is_named(reporting: dict[str, Any]) -> None:
    won = row("w4a8 g128", (64, 128), 1, 1.0, ratio_bf16=1.5, ratio_fp8=1.0)
    lost = row("w4a8 g128", (64, 128), 8, 1.0, ratio_bf16=1.2, ratio_fp8=0.97)
    rows = [won, lost, row("bf16", (64, 128), 1, 1.5), row("bf16", (64, 128), 8, 1.2)]
    assert reporting["losses"](rows, "bf16") == []
    assert reporting["losses"](rows, "fp8") == ["w4a8 g128 (64, 128) M=8: x0.97"]
    text = "\n".join(reporting["report"](rows))
    assert "slower than bf16: nowhere" in text
    assert "slower than fp8: w4a8 g128 (64, 128) M=8: x0.97" in text


def test_outside_git_the_commit_is_unknown(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert script["provenance"](torch.device("cpu"))["commit"] == "unknown"
    monkeypatch.setenv("PATH", "")
    assert script["provenance"](torch.device("cpu"))["commit"] == "unknown"


def test_plot(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("agg")
    rows = []
    for m, ratio in ((1, 3.0), (64, 2.0)):
        rows += [row("w4a8 g128", (64, 128), m, 1.0, ratio_bf16=ratio, ratio_fp8=1.0)]
        rows += [row("bf16", (64, 128), m, ratio, ratio_bf16="", ratio_fp8="", limit="")]
    facts = {"label": "a", "device": "d", "torch": "t", "triton": "t", "commit": "c"}
    path = script["save"]([{**r, **facts} for r in rows], tmp_path)
    plot = runpy.run_path(str(PLOT))
    plot["main"]([str(path)])
    assert (tmp_path / "gemm.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_a_point_on_the_device(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_TABLES", {})
    script["main"](["--shapes", "4096x4096", "--sizes", "16", "--out", str(tmp_path)])
    with (tmp_path / "gemm.csv").open(newline="") as file:
        times = {row["what"]: float(row["us"]) for row in csv.DictReader(file)}
    # the weight alone takes 1.8 us at 4.69 TB/s: less would mean that it came from L2
    assert times["w4a8 g128"] > 1.8
    assert times["bf16"] > 7.1
