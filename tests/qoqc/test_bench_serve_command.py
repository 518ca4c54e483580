"""`qoqc bench --serve` from the command line to the files it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from qoqc.cli import main
from qoqc.testing import tiny_model

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
QUICK = ["--serve", "--requests", "6", "--prompt", "12", "--gen", "4", "--warm-up", "2"]


def test_burst_on_both_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    check_burst(tmp_path / "model", "float32", tmp_path / "out", capsys)


@pytest.mark.slow
def test_burst_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_burst(MODEL, "bfloat16", tmp_path, capsys)


def check_burst(model: Path, dense: str, out: Path, shown: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    more = ["--device", "cpu", "--glue", "eager", "-o", str(out)]
    assert main(["bench", str(model), *QUICK, *more]) == 0
    found = json.loads((out / "serve.json").read_text())
    assert [load["system"] for load in found["loads"]] == [dense, "qoqc"]
    for load in found["loads"]:
        assert (load["requests"], load["failed"], load["generated_tokens"]) == (6, 0, 24)
        assert len(load["answered"]) == 6 and len(load["first_ms"]) == 3
    ratio = found["loads"][1]["tok_s"] / found["loads"][0]["tok_s"]
    assert found["speedup"] == pytest.approx(ratio)
    assert found["notes"] == []
    assert (out / "serve.png").read_bytes()[1:4] == b"PNG"
    text = shown.readouterr().out
    assert "6 requests, all at once, 12 tokens in, 4 out" in text
    assert f"qoqc: {ratio:.1f} x the tokens per second of {dense}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve"], "bench takes a MODEL or --shape NAME: one of them"),
        (["--serve", "--url", "http://127.0.0.1:1", str(MODEL)], "--url names a server with its"),
        (["--serve", "--url", "http://127.0.0.1:1"], "--url http://127.0.0.1:1: Connection error"),
        ([str(MODEL), "--serve", "--api-key-file", "x"], "--api-key-file goes with --url"),
        ([str(MODEL), "--serve", "--rate", "0"], "--rate 0.0: expected requests per second"),
        ([str(MODEL), "--serve"], "1152 tokens are asked for, the model takes 1024"),
        ([str(MODEL), "--rate", "4"], "--url, --rate and --spread describe a load: add --serve"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_without_openai(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "openai" else find(name, package),
    )
    monkeypatch.delitem(sys.modules, "qoqc.bench.serve_client", raising=False)
    assert main(["bench", "--serve", "--url", "http://127.0.0.1:1"]) == 2
    assert "pip install 'qoqc[bench]'" in capsys.readouterr().err
