"""Machine code that came with an artifact is what Triton would have compiled, found by its key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qoqc.artifact.machine_code import seed
from qoqc.artifact.manifest import KERNELS, Manifest
from qoqc.artifact.save import save
from qoqc.artifact.write import complete
from qoqc.cli import main
from qoqc.errors import ArtifactError
from qoqc.testing import tiny_model

CHOICES = """
import json, sys, torch, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from qoqc.artifact.kernel_files import write_kernels
from qoqc.artifact.kernel_sources import Wanted, choices, devices
from qoqc.artifact.machine_code import seed
from qoqc.codegen.aot import Recorder
from qoqc.codegen.build import build
from qoqc.codegen.kernels.quantize import QuantizeSpec
from qoqc.ir.spec import KVSpec

cpu = torch.device("cpu")
quantize, append = QuantizeSpec(256, torch.bfloat16), KVSpec(2, 64, 64)
wanted = [Wanted("quantize", quantize), Wanted("kv_append", append)]
"""

WRITE = f"{CHOICES}write_kernels(wanted, cpu, Path(sys.argv[1]), (80, 90))"

LAUNCH = f"""{CHOICES}
class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

hits = []
triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
triton.runtime.driver.set_active(Driver())
if sys.argv[1:]:
    seed(Path(sys.argv[1]))
code = []
for choice in choices(wanted, devices(cpu, (90,))):
    launch = Recorder(choice.tile)
    choice.family.trial(choice.wanted.spec, choice.size, cpu)(launch)
    kernel = build(choice.family, choice.wanted.spec, choice.tile)
    # all of a launch but the launch, for which there is no GPU
    options = choice.family.options(choice.tile)
    made = kernel.fn.warmup(*launch.arguments, grid=launch.grid, **options)
    code.append(made.kernel.hex())
print(json.dumps([hits, code]))
"""


def run(script: str, cache: Path, *arguments: str) -> str:
    """The output of a process that compiles, with an empty cache of its own."""
    left_out = ("TRITON_INTERPRET", "TRITON_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    env |= {"QOQC_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the machine code of two ops for sm_80 and sm_90."""
    root = tmp_path_factory.mktemp("machine-code")
    save(tiny_model("llama", num_hidden_layers=1), root / "artifact")
    run(WRITE, root / "maker", str(root / "artifact"))
    complete(Manifest.read(root / "artifact"), root / "artifact")
    return root / "artifact"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path / "triton"


def with_facts(artifact: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose first entry is edited, by somebody who renewed the checksums."""
    shutil.copytree(artifact, target)
    path = min((target / KERNELS).glob("*.cubin.json"))
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))
    complete(Manifest.read(target), target)
    return target


def test_a_launch_finds_it_and_compiles_nothing(artifact: Path, tmp_path: Path) -> None:
    hits, code = json.loads(run(LAUNCH, tmp_path / "server", str(artifact)))
    assert len(code) == 6, "two ops, three sizes"
    assert hits
    assert all(hits)
    carried = {path.read_bytes().hex() for path in (artifact / KERNELS).glob("*.sm_90.cubin")}
    assert set(code) == carried
    hits, _ = json.loads(run(LAUNCH, tmp_path / "other"))
    assert not all(hits), "what is not seeded is compiled"


def test_the_command(artifact: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len({json.loads(path.read_text())["key"] for path in _facts(artifact)})
    twice = len(_facts(artifact)) - count
    assert main(["cache", "seed", str(artifact)]) == 0
    assert f"{count} kernels added, {twice} were there already" in capsys.readouterr().out
    assert len(list(cache.glob("*/*.cubin"))) == count
    assert main(["cache", "seed", str(artifact)]) == 0
    assert f"0 kernels added, {count + twice} were there" in capsys.readouterr().out


def _facts(artifact: Path) -> list[Path]:
    return list((artifact / KERNELS).glob("*.cubin.json"))


def test_an_entry_of_triton_is_not_replaced(artifact: Path, cache: Path) -> None:
    seed(artifact)
    (first, *_) = cache.glob("*/*.cubin")
    first.write_bytes(b"compiled here")
    assert seed(artifact).added == 0
    assert first.read_bytes() == b"compiled here"


def test_another_build_of_triton(artifact: Path, tmp_path: Path, cache: Path) -> None:
    def edit(facts: dict[str, Any]) -> None:
        facts["triton"] = "another"

    other = with_facts(artifact, tmp_path / "other", edit)
    found, usual = seed(other), len(_facts(other))
    assert found.foreign == 1
    assert found.added + found.present == usual - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("key", "../../../x"), ("key", "0" * 64), ("name", "../x"), ("name", 3), ("metadata", [])],
)
def test_names_that_lead_elsewhere(
    artifact: Path, tmp_path: Path, cache: Path, field: str, value: Any
) -> None:
    def edit(facts: dict[str, Any]) -> None:
        facts[field] = value

    other = with_facts(artifact, tmp_path / "other", edit)
    with pytest.raises(ArtifactError, match=r"cubin\.json is damaged"):
        seed(other)
    assert list(cache.glob("**/*.cubin")) == []
    assert {path.name for path in tmp_path.iterdir()} <= {"other", "triton"}


def test_damaged_code_is_not_used(artifact: Path, tmp_path: Path, cache: Path) -> None:
    other = shutil.copytree(artifact, tmp_path / "other")
    path = min((other / KERNELS).glob("*.cubin"))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ArtifactError, match=f"{path.name} is damaged"):
        seed(other)
    assert not cache.exists()


def test_an_artifact_without_machine_code(artifact: Path, tmp_path: Path, cache: Path) -> None:
    other = shutil.copytree(artifact, tmp_path / "other")
    for path in (other / KERNELS).glob("*.cubin*"):
        path.unlink()
    complete(Manifest.read(other), other)
    with pytest.raises(ArtifactError, match="has no machine code; make it by qoqc compile --arch"):
        seed(other)
