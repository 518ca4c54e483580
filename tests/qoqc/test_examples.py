"""The examples run and show what their docstrings promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "models" / "llama-stories-4m"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--glue", "eager"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(MODEL), "Tell me a story about a dog.", "--max-new-tokens", "16"]
    run("chat.py", *arguments, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert out.startswith("Once upon a time")
    prefill, decode = out.splitlines()[-2:]
    assert "35 linears quantized, 0 attentions" in prefill
    assert "35 linears quantized, 5 attentions" in decode


def test_compile_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("compile_model.py", str(MODEL), str(tmp_path / "out"), monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {tmp_path / 'out'}: 35 packed weights, 8.0 -> 3.7 MB"
    assert lines[1] == "loaded again: the 16-bit copies are gone"
    assert lines[2].startswith("Once upon a time, there was a dog")
    assert len(lines[2].split()) > 12
