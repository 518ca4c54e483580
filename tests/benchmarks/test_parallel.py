"""The benchmark of several ranks: that it measures, not what."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "parallel.py"

SMALL = json.dumps(
    {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 512,
    }
)
ARGUMENTS = ["--shape", "llama-3-8b", "--layers", "1", "--sizes", SMALL]
ARGUMENTS += ["--batch", "1,2", "--prompt", "9", "--gen", "3"]


def test_one_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    out = tmp_path / "rows.jsonl"
    rows = runpy.run_path(str(SCRIPT))["main"]([*ARGUMENTS, "--out", str(out)])
    assert [(row["batch"], row["ranks"], row["layers"]) for row in rows] == [(1, 1, 1), (2, 1, 1)]
    assert all(row["alike"] and row["first_call_s"] > row["prefill_s"] > 0 for row in rows)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == rows == [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    out = tmp_path / "rows.jsonl"
    command += ["--master-port", "29688", str(SCRIPT), *ARGUMENTS, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["batch"], row["ranks"], row["alike"]) for row in rows] == [
        (1, 2, True),
        (2, 2, True),
    ]
