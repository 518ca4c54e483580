"""What calibration chose, from the plain values of a manifest."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

from qoqc.calibrate.recipe import LayerRecord, Recipe, Record
from qoqc.cli.record import gate_line, kv_text, layer_row, show_artifact
from qoqc.errors import ArtifactError

SEARCHED = {"alpha": 0.3, "beta": 0.7, "gain": 0.9, "trials": 15}
LAYER = LayerRecord(
    "model.layers.0",
    strengths={
        "attention": {**SEARCHED, "beta": 0.0},
        "values": SEARCHED,
        "x.down.weight": SEARCHED,
    },
    kv={"bits": 8, "errors": {"4": 0.61, "8": 0.021}, "reason": "attention error"},
    errors={"x.down.weight": 0.01},
    sqnr=17.25,
    refused=["model.layers.0: no gate"],
)
BARE = LayerRecord("model.layers.1", sqnr=20.0, kv={"bits": 4, "errors": {"4": 0.2}, "reason": ""})
GATE = {
    "text": "held out", "windows": 9, "seq": 128, "perplexity": 52.5, "baseline": 50.0,
    "increase": 5.0, "kl": 0.0123, "agreement": 0.75,
}  # fmt: skip


def manifest(**changes: Any) -> Any:
    """The two entries as they come out of JSON."""
    record = Record(Recipe(), 16, 128, (LAYER, BARE), ("residual stream: it goes through x",))
    stored = json.loads(json.dumps({"recipe": record.entry(), "gate": GATE}))
    return SimpleNamespace(**{**stored, **changes})


def test_it_says_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    show_artifact(manifest(), "out")
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if "model.layers.0 " in line]
    cells = row.replace("│", " ").replace("|", " ").split()
    assert cells == ["model.layers.0", "0.3/0", "0.3/0.7", "0.3/0.7", "8", "0.021", "17.2"]
    assert "  left out: residual stream: it goes through x\n" in shown
    assert "  left out: model.layers.0: no gate\n" in shown
    assert "16 windows of 128 tokens; 45 trials for alpha and beta; 6.00 bits per key" in shown
    assert gate_line(GATE) in shown.splitlines()


def test_what_was_not_searched_is_a_dash() -> None:
    assert layer_row(dataclasses.asdict(BARE)) == (
        "model.layers.1", "-", "-", "-", "4", "0.200", "20.0"
    )  # fmt: skip
    empty = dataclasses.asdict(LayerRecord("model.layers.2"))
    assert layer_row(empty) == ("model.layers.2", "-", "-", "-", "-", "-", "-")


def test_the_gate_in_one_line() -> None:
    assert gate_line(GATE) == (
        "perplexity 52.5000, 50.0000 in 16 bit (+5.00 %); KL 0.01230; same top-1 75.00 %; 9 "
        "windows of 128, held out"
    )


@pytest.mark.parametrize(
    "changes", [{"recipe": {}}, {"gate": {"kl": 1.0}}, {"recipe": {"layers": 3}}]
)
def test_a_manifest_that_was_edited(changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="out: the manifest's recipe or gate cannot be read"):
        show_artifact(manifest(**changes), "out")


def test_bits_that_differ_by_layer() -> None:
    assert kv_text(4, ()) == "4"
    assert kv_text(4, (4, 8, 4, 4)) == "5"
    assert kv_text(4, (4, 8, 4, 4, 4, 4, 4, 4)) == "4.5"
