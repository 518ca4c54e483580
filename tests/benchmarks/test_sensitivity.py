"""What roundings alone do to logits: nothing if all are the same, something if one is another."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sensitivity.py"


def test_distances(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(SCRIPT))
    script["main"](["--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    means = [float(value) for line in lines for value in re.findall(r"mean ([\d.]+)%", line)]
    assert len(means) == 2 + len(script["SHARES"])
    same, *others = means
    assert same == 0.0
    assert all(0 < other < 100 for other in others)
