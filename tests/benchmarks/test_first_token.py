"""The start-up benchmark: fresh processes that compile nothing, for their caches are full."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from subprocess import CalledProcessError

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import qoqc

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "llama-stories-4m"


@pytest.mark.slow
def test_fresh_processes_compile_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QOQC_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    artifact = tmp_path / "artifact"
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    qoqc.save(model, artifact, AutoTokenizer.from_pretrained(MODEL))
    script = runpy.run_path(str(ROOT / "benchmarks" / "first_token.py"))
    with pytest.raises(CalledProcessError):  # the cache is empty
        script["run"](str(artifact), "Once", 1, "--require-cached")
    capsys.readouterr()
    # a run that compiles ends with an error, and main raises it
    found = script["main"]([str(artifact), "--runs", "1"])
    assert json.loads(capsys.readouterr().out) == found
    assert all(seconds > 0 for seconds in found.values())
    with capsys.disabled():
        print(f"\n{found}")
