"""Tiles that were searched for travel with an artifact, and kernels are built with them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qoqc
from qoqc.artifact import kernel_files
from qoqc.artifact.kernel_sources import Wanted
from qoqc.artifact.load import load_model
from qoqc.artifact.manifest import TUNING, Manifest
from qoqc.artifact.save import save
from qoqc.artifact.write import complete
from qoqc.codegen import dispatch
from qoqc.codegen.build import OPS
from qoqc.codegen.family import Tile
from qoqc.codegen.kernels.quantize import QuantizeSpec
from qoqc.codegen.tuning import table
from qoqc.runtime.device import DeviceKey, device_key
from qoqc.testing import tiny_model

CPU = torch.device("cpu")
HERE = device_key(CPU)
QUANTIZE = OPS["quantize"]
FORM = QUANTIZE.forms[0]
SPEC = QuantizeSpec(128, torch.float32)
TOKENS = 16

HEURISTIC = FORM.heuristic(SPEC, TOKENS, HERE)
OTHERS = [tile for tile in FORM.candidates(SPEC, TOKENS, HERE) if tile != HEURISTIC]


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has searched for nothing and loaded nothing."""
    fresh_machine(tmp_path / "server", monkeypatch)


def fresh_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQC_CACHE", str(cache))
    monkeypatch.setattr(table, "_TABLES", {})
    monkeypatch.setattr(table, "_ADOPTED", {})
    monkeypatch.setattr(table, "shipped", dict)
    monkeypatch.setattr(dispatch, "_KERNELS", {})


def found(tile: Tile, device: DeviceKey = HERE) -> None:
    """What a search leaves in the user's table."""
    table.record(table.entry_key(QUANTIZE, SPEC, TOKENS, device), FORM, tile)


def built() -> Tile:
    """The tile of the kernel that a launch on TOKENS tokens gets."""
    return dispatch.kernel_for(QUANTIZE, SPEC, TOKENS, CPU).tile


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact made where a search had found OTHERS[0]."""
    root = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        fresh_machine(root / "maker", patch)
        patch.setattr(kernel_files, "devices", lambda *_: (HERE,))
        found(OTHERS[0])
        manifest = save(tiny_model("llama"), root / "artifact")
    assert [name for name in manifest.files if name.startswith(TUNING)] == [
        f"{TUNING}/interpreter-sm_80.json"
    ]
    return root / "artifact"


def edited(artifact: Path, target: Path, text: str) -> Path:
    """A copy whose table is `text`, and whose manifest agrees."""
    shutil.copytree(artifact, target)
    (file,) = (target / TUNING).iterdir()
    file.write_text(text)
    complete(Manifest.read(target), target)
    return target


@pytest.mark.parametrize("how", ["load", "from_pretrained", "option"])
def test_the_tile_of_the_artifact_is_launched(tuned: Path, how: str) -> None:
    assert built() == HEURISTIC
    dispatch._KERNELS.clear()
    if how == "load":
        qoqc.load(tuned, glue="eager")
    elif how == "from_pretrained":
        AutoModelForCausalLM.from_pretrained(tuned)
    else:
        torch._dynamo.reset()
        options = {"artifact": str(tuned), "glue": "eager"}
        model = torch.compile(tiny_model("llama"), backend="qoq", options=options)
        with torch.no_grad():
            model(torch.tensor([[3, 4]]))
    assert built() == OTHERS[0]


def test_the_users_table_comes_first(tuned: Path) -> None:
    load_model(tuned)
    found(OTHERS[1])
    assert built() == OTHERS[1]


def test_the_artifact_loaded_last_comes_first(tuned: Path, tmp_path: Path) -> None:
    text = next((tuned / TUNING).iterdir()).read_text()
    raw = json.loads(text)
    raw["entries"][0]["tile"]["constexprs"] = dict(OTHERS[1].constexprs)
    raw["entries"][0]["tile"]["num_warps"] = OTHERS[1].num_warps
    raw["entries"][0]["tile"]["num_stages"] = OTHERS[1].num_stages
    other = edited(tuned, tmp_path / "other", json.dumps(raw))
    load_model(tuned)
    load_model(other)
    assert built() == OTHERS[1]
    load_model(tuned)
    dispatch._KERNELS.clear()
    assert built() == OTHERS[0]


@pytest.mark.parametrize("change", ["device", "tile", "form"])
def test_what_does_not_fit_is_not_used(tuned: Path, tmp_path: Path, change: str) -> None:
    raw = json.loads(next((tuned / TUNING).iterdir()).read_text())
    (entry,) = raw["entries"]
    if change == "device":
        entry["device"]["sm_count"] += 1
    elif change == "tile":
        entry["tile"]["num_warps"] = 32
    else:
        entry["form"] = "gemm_plain"
    load_model(edited(tuned, tmp_path / "other", json.dumps(raw)))
    assert built() == HEURISTIC


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"version": 1, "entries": []}',
        "[" * 100_000,
        '{"version": 2, "entries": [{"op": 1, "spec": 1, "device": 1, "size": 1, "form": 1, '
        '"tile": {"constexprs": {}, "num_warps": 1e999, "num_stages": 1}}]}',
        " " * (table.MAX_BYTES + 1),
    ],
    ids=["empty", "version", "deep", "infinite", "huge"],
)
def test_a_damaged_table_is_ignored_with_one_warning(
    tuned: Path, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = edited(tuned, tmp_path / "other", text)
    with caplog.at_level(logging.WARNING, logger="qoqc"):
        load_model(damaged)
        assert built() == HEURISTIC
    (told,) = [record.getMessage() for record in caplog.records]
    assert "interpreter-sm_80.json is ignored, its tiles are not used" in told


def test_without_its_table_an_artifact_loads(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / TUNING)
    load_model(tmp_path / "other")
    assert built() == HEURISTIC


def test_what_was_adopted_is_saved_again_and_what_is_shipped_is_not(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_files, "devices", lambda *_: (HERE,))
    shipped = {table.entry_key(QUANTIZE, SPEC, 1, HERE): (FORM.name, OTHERS[1])}
    monkeypatch.setattr(table, "shipped", lambda: shipped)
    load_model(tuned)
    entries = kernel_files.write_kernels([Wanted("quantize", SPEC)], CPU, tmp_path)
    assert [entry["size"] for entry in entries if entry["tuned"]] == [1, TOKENS]
    (file,) = (tmp_path / TUNING).iterdir()
    assert [entry["size"] for entry in json.loads(file.read_text())["entries"]] == [TOKENS]
