"""The calibration benchmark on a model that a CPU calibrates in seconds."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibration.py"


@pytest.mark.parametrize("offload", [[], ["--offload"]])
def test_a_small_model(offload: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 384,
    }
    asked = ["--layers", "2", "--sizes", json.dumps(sizes), "--windows", "4", "--window", "32"]
    main = runpy.run_path(str(SCRIPT))["main"]
    result = main([*asked, "--device", "cpu", *offload])
    assert (result["layers"], result["tokens"], result["refused"]) == (2, 128, [])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    assert [line.partition(":")[0] for line in lines[:-1]] == ["layer 1/2", "layer 2/2"]
