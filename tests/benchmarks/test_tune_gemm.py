from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.tuning import table as tables
from qoqc.codegen.tuning.choose import known
from qoqc.codegen.tuning.search import shortlist
from qoqc.codegen.tuning.shapes import MODELS, shapes_of
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import device_key

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune_gemm.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_the_table_it_writes_is_one_that_is_shipped(
    script: dict[str, Any],
    tmp_path: Path,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "tables" / "here.json"
    # no worker processes: what they prove has tests of its own
    script["main"].__globals__["failures"] = lambda prove, tasks, *rest: {}
    where = ["--device", device.type, "--out", str(path), "--shapes", "64x128"]
    script["main"]([*where, "--sizes", "1", "2"])
    monkeypatch.setattr(tables, "_TABLES", {})
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    entries = json.loads(path.read_text())["entries"]
    assert [(e["spec"]["group_size"], e["size"]) for e in entries] == [
        (-1, 1), (128, 1), (-1, 2), (128, 2),
    ]  # fmt: skip
    spec = LinearSpec(128, 64, 128, torch.bfloat16)
    form, tile = known(GEMM, spec, 1, device_key(device))
    (entry,) = (e for e in entries if (e["spec"]["group_size"], e["size"]) == (128, 1))
    assert (form.name, dict(tile.constexprs)) == (entry["form"], entry["tile"]["constexprs"])
    printed = capsys.readouterr().out
    assert printed.count(" warps=") == 4
    assert "4 entries in" in printed


def test_what_failed_in_a_worker_is_not_timed(
    script: dict[str, Any], tmp_path: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_but_one(prove: Any, tasks: list[Any], *rest: Any) -> dict[int, str]:
        return dict.fromkeys(range(1, len(tasks)), "its process died")

    script["main"].__globals__["failures"] = all_but_one
    path = tmp_path / "here.json"
    where = ["--device", device.type, "--out", str(path), "--shapes", "64x128"]
    script["main"]([*where, "--sizes", "1"])
    # one candidate is left, of one format
    assert len(json.loads(path.read_text())["entries"]) == 1
    printed = capsys.readouterr().out
    assert "no candidate is left" in printed
    assert "its process died" in printed


def test_candidates_are_named_once_with_all_their_sizes(
    script: dict[str, Any], device: torch.device
) -> None:
    specs = script["specs_of"](["64x128"])
    assert specs == [LinearSpec(128, 64, g, torch.bfloat16) for g in (128, -1)]
    tasks = script["candidates_of"](GEMM, specs, (1, 2, 4), device)
    assert len({(task.spec, task.form, task.tile) for task in tasks}) == len(tasks)
    key = device_key(device)
    wanted = sum(len(shortlist(GEMM, spec, size, key)) for spec in specs for size in (1, 2, 4))
    assert sum(len(task.sizes) for task in tasks) == wanted
    assert any(task.sizes == (1, 2, 4) for task in tasks)


def test_shapes() -> None:
    found = shapes_of([*MODELS, "64x128"])
    assert found[4096, 4096] == "llama-3-8b o"
    assert found[64, 128] == "64x128"
    assert len(found) == 13 + 1
    for wrong in ("llama-9", "64", "64x", "0x128", "ax128", "1x2x3"):
        with pytest.raises(ValueError, match="expected one of llama-3-8b, .* like 4096x14336"):
            shapes_of([wrong])


@pytest.mark.gpu
def test_tuning_on_the_device(script: dict[str, Any], tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    path = tmp_path / "here.json"
    script["main"](["--shapes", "4096x4096", "--sizes", "16", "--out", str(path)])
    assert len(json.loads(path.read_text())["entries"]) == 2
