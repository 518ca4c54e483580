"""Graphs as text: complete, short where layers are alike, and part of an artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qoqc
from qoqc.artifact.manifest import GRAPHS, PATH, Manifest
from qoqc.artifact.survey import Survey, survey
from qoqc.cli import main
from qoqc.config import Options
from qoqc.errors import ArtifactError
from qoqc.testing import tiny_model

MARKS = ("%", r"\^", r"first\.")
"""What stands before the number of a value of this part, the one before and the first."""


def of(family: str, **sizes: Any) -> Survey:
    return survey(tiny_model(family, **sizes), Options())


def parts(text: str) -> dict[str, list[str]]:
    """The lines of each part by its title."""
    found: dict[str, list[str]] = {}
    for block in text.split("\n\n")[2:]:
        title, *lines = block.strip().splitlines()
        found[title.removesuffix(":")] = [line.strip() for line in lines]
    return found


def test_layers_that_are_alike_are_written_once() -> None:
    prefill, decode = of("llama", num_hidden_layers=5).listings
    for text in (prefill, decode):
        found = parts(text)
        layers = "model.layers.0", "model.layers.1 to model.layers.3, each", "model.layers.4"
        assert list(found) == ["first", *layers, "last"]
        same = found["model.layers.1 to model.layers.3, each"]
        # the layer after begins alike, and has the last residual add and norm
        assert found["model.layers.4"][: len(same)] == same
        assert sum("qoqc.w4a8" in line for line in same) == 4
        assert any("model.layers.*.self_attn.(q_proj k_proj v_proj).qweight" in x for x in same)
        assert found["last"][-1].startswith("return (%")
    assert "qoqc.kv4_decode" in decode
    assert "qoqc.kv4_decode" not in prefill


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_neox"])
def test_every_value_that_is_read_has_a_line_before(family: str) -> None:
    for text in of(family).listings:
        sizes: list[int] = []
        for lines in parts(text).values():
            for number, line in enumerate(lines, 1):
                called = line.partition("  # ")[0]
                if not line.startswith("return "):
                    value, _, called = called.partition(" = ")
                    assert value == f"%{number}"
                read = {mark: re.findall(rf"{mark}(\d+)", called) for mark in MARKS}
                assert all(0 < int(n) < number for n in read["%"]), line
                assert all(0 < int(n) <= sizes[-1] for n in read[r"\^"]), line
                assert all(0 < int(n) <= sizes[0] for n in read[r"first\."]), line
            sizes.append(len(lines))
        assert lines[-1].startswith("return ")


def test_the_same_model_gives_the_same_text() -> None:
    first, second = of("llama"), of("llama")
    assert first.listings == second.listings
    assert first.listings != of("qwen2").listings
    assert "0x" not in "".join(first.listings), "an address is of one process"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("listing") / "artifact"
    qoqc.save(tiny_model("llama", torch.bfloat16), directory)
    return directory


def test_an_artifact_has_them_and_can_do_without(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.read(saved)
    files = [f"{GRAPHS}/prefill.txt", f"{GRAPHS}/decode.txt"]
    assert [graph["file"] for graph in manifest.graphs] == files
    assert set(files) < manifest.files.keys()
    assert manifest.listings(saved) == [saved / name for name in files]
    launches = manifest.graphs[1]["launches"]
    assert "model.layers.0 to model.layers.1: " in launches["layers"][0]
    page = tmp_path / "page.html"
    assert main(["inspect", str(saved), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert launches["layers"][0] in " ".join(shown.split())
    assert all(str(saved / name) in shown for name in files)
    assert "qoqc.kv4_decode(" in page.read_text()

    copied = tmp_path / "copied"
    qoqc.load(saved).save_pretrained(copied)
    assert [(copied / name).read_bytes() for name in files] == [
        (saved / name).read_bytes() for name in files
    ]
    assert set(files) < Manifest.read(copied).files.keys()

    (copied / files[0]).unlink()
    qoqc.load(copied)
    assert main(["inspect", str(copied)]) == 0
    assert files[0] not in capsys.readouterr().out
    with (copied / files[1]).open("a") as file:
        file.write(" ")
    with pytest.raises(ArtifactError, match=f"{files[1]} is damaged"):
        qoqc.load(copied)
    (copied / PATH).unlink()
    with pytest.raises(ArtifactError, match="manifest"):
        qoqc.load(copied)
