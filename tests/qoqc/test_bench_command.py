"""`qoqc bench` from the command line to the files it writes, on the bundled model and a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.cli import main
from qoqc.testing import tiny_model

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
QUICK = ["--device", "cpu", "--glue", "eager", "--batch", "2", "--prompt", "8", "--gen", "3"]


def check_run(model: Path, out: Path, shown: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    more = ["--breakdown", "2", "--served", "8x3", "--prefill", "3x8", "-o", str(out)]
    assert main(["bench", str(model), *QUICK, *more]) == 0
    found = json.loads((out / "bench.json").read_text())
    speeds = [(s["system"], s["batch"], s["prompt"], s["gen"]) for s in found["speeds"]]
    dense = found["models"][0]["system"]
    assert speeds == [(name, *size) for name in (dense, "qoqc") for size in [(2, 8, 3), (3, 8, 2)]]
    assert all(s["step_ms"] > 0 for s in found["speeds"] if s["gen"] > 2)
    (served,) = found["served"]
    assert (served["system"], served["batch"]) == ("qoqc", 2)
    (part,) = found["breakdowns"]
    assert part["busy_us"] > 0 and part["kernels"]
    assert found["notes"] == []
    assert (out / "bench.png").exists() is (importlib.util.find_spec("matplotlib") is not None)
    text = shown.readouterr().out
    assert "decode tok/s" in text and "a decode step at batch 2" in text


def test_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    check_run(tmp_path / "model", tmp_path / "new" / "out", capsys)


@pytest.mark.slow
def test_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_run(MODEL, tmp_path, capsys)


def test_without_matplotlib_only_the_picture_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def find_other(name: str, package: str | None = None) -> Any:
        return None if name == "matplotlib" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_other)
    arguments = ["bench", str(MODEL), "--batch", "none", "--no-baseline", "--device", "cpu"]
    assert main([*arguments, "-o", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert "no bench.png: it needs matplotlib, pip install 'qoqc[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench takes a MODEL or --shape NAME: one of them"),
        ([str(MODEL), "--shape", "llama-3-8b"], "bench takes a MODEL or --shape NAME"),
        (["--shape", "llama-4"], "shape 'llama-4': expected one of llama-3-8b, llama-2-7b"),
        (["--shape", "llama-3-8b", "--dtype", "fp16"], "--dtype: a model of random weights is in"),
        ([str(MODEL), "--layers", "2"], "--layers goes with --shape"),
        ([str(MODEL), "--batch", "1;2"], "--batch 1;2: expected numbers like 1,16,64"),
        ([str(MODEL), "--served", "5"], "--served 5: expected sizes like 8x1024"),
        ([str(MODEL), "--prompt", "1000"], "1128 tokens are asked for, the model takes 1024"),
        ([str(MODEL), "--lm-head", "8"], "option lm_head='8': expected one of '16', 'w8a8'"),
        (["/nowhere"], "/nowhere is not a directory with a model"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
