"""The rows of the ablation: what they add up to, what is stored of them, what is drawn."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.calibrate.recipe import Recipe

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "llama-stories-4m"
RESULTS = ROOT / "benchmarks" / "results" / "ablation-h200.jsonl"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "ablation.py"))


def test_the_steps_add_up_to_the_recipe(script: dict[str, Any]) -> None:
    rows = [recipe for _, recipe in script["recipes"]()]
    assert rows[12] == Recipe()
    assert rows[10] == Recipe(group_size=-1, reorder=False)
    for before, after in zip(rows[2:], rows[3:], strict=False):
        old, new = dataclasses.asdict(before), dataclasses.asdict(after)
        assert sum(old[name] != new[name] for name in old) == 1, "one technique at a time"


def test_a_control_on_this_machine(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch._dynamo.reset()
    calibration, text, out = (tmp_path / name for name in ("calibration", "text", "rows.jsonl"))
    calibration.write_text("Once upon a time there was a small boat on a wide lake. " * 30)
    text.write_text("Tom had a red ball. He gave it to his sister, and she was glad. " * 12)
    given = ["--window", "64", "--tokens", "128", "--samples", "2", "--steps", "1"]
    script["main"]([str(MODEL), str(calibration), str(text), *given, "--json", str(out)])
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["model"], row["number"], row["control"]) == ("llama-stories-4m", 1, True)
    figures = row["texts"]["text"]
    assert figures["kl"] > 0
    assert figures["increase"] == pytest.approx(
        100 * (figures["perplexity"] / figures["baseline"] - 1)
    )
    assert f"({figures['increase']:+.2f} %)" in capsys.readouterr().out


def test_what_is_stored_has_the_names_of_the_steps(script: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    names = [name for name, _ in script["recipes"]()]
    assert {row["step"] for row in rows} == set(names)
    for row in rows:
        assert row["step"] == names[row["number"]]
        assert row["control"] == (row["number"] < len(script["CONTROLS"]))


def test_models_with_every_step_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("agg")
    plot = runpy.run_path(str(ROOT / "benchmarks" / "ablation_plot.py"))
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = plot["ladders"](rows)
    text = "wikitext2-test.txt"
    assert set(lines) == {("llama-stories-27m", text), ("llama-stories-4m", text)}
    assert all(len(increases) == 11 for increases in lines.values())
    copy = tmp_path / "rows.jsonl"
    copy.write_text(RESULTS.read_text())
    plot["main"]([str(copy)])
    assert copy.with_suffix(".png").stat().st_size > 10_000
    controls = RESULTS.read_text().splitlines()[:2]
    copy.write_text("".join(f"{line}\n" for line in controls))
    with pytest.raises(SystemExit, match="no model has a row for every step"):
        plot["main"]([str(copy)])
