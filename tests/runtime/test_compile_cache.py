"""Keys of compiled code: whatever it depends on makes another, and nothing is compiled twice."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from qoqc.artifact.save import save
from qoqc.errors import NotCached
from qoqc.runtime import compile_cache, compile_count
from qoqc.runtime.compile_cache import (
    PARTS,
    activate,
    differences,
    digest,
    digest_of_tree,
    evict,
    key_parts,
    keys_in_use,
)
from qoqc.runtime.device import DeviceKey
from qoqc.testing import tiny_model

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def key(device: torch.device = CPU, **environment: str) -> str:
    return digest(key_parts(device, environment))


def test_the_same_gives_the_same() -> None:
    assert key(TRITON_X="1") == key(TRITON_X="1")


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (compile_cache, "sources_digest", lambda: "other"),
        (platform, "python_version", lambda: "3.99"),
        (torch, "__version__", "9.9"),
        (torch.version, "git_version", "abc"),
        (compile_cache, "_version", lambda module: "9.9"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "none"),
        (platform, "machine", lambda: "pdp11"),
    ],
)
def test_each_part_makes_another_key(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    before = key()
    monkeypatch.setattr(owner, name, value)
    assert key() != before


def test_each_fact_of_a_gpu_makes_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"name": "H200", "arch": 90, "sm_count": 132, "shared_bytes": 1}
    state = {"driver": "1", **facts}
    monkeypatch.setattr(compile_cache, "driver_version", lambda: state["driver"])
    monkeypatch.setattr(
        compile_cache, "device_key", lambda device: DeviceKey(*(state[name] for name in facts))
    )
    keys = {key(CUDA), key()}
    for name, value in {"driver": "2", "name": "H100", "arch": 80}.items():
        state[name] = value
        keys.add(key(CUDA))
    for name in ("sm_count", "shared_bytes"):
        state[name] = 7
        keys.add(key(CUDA))
    monkeypatch.setattr(torch.version, "cuda", "99")
    keys.add(key(CUDA))
    assert len(keys) == 8


@pytest.mark.parametrize(
    "name",
    [
        "TORCHINDUCTOR_FREEZING",
        "TORCH_COMPILE_CPROFILE",
        "TRITON_INTERPRET",
        "PYTORCH_CUDA_ALLOC_CONF",
        "NVIDIA_TF32_OVERRIDE",
        "OMP_NUM_THREADS",
        "CXX",
        "QOQC_FUTURE_SWITCH",
    ],
)
def test_each_switch_of_the_environment_makes_another_key(name: str) -> None:
    assert len({key(), key(**{name: "1"}), key(**{name: "2"})}) == 3


def test_places_and_strangers_make_none() -> None:
    names = ["QOQC_CACHE", "QOQC_LOG", "QOQC_DUMP", "TORCHINDUCTOR_CACHE_DIR", "HOME", "LANG"]
    assert {key(**{name: "x"}) for name in names} == {key()}


@pytest.mark.parametrize("name", ["passes/merge.py", "codegen/kernels/gemm.py", "t/table.json"])
def test_every_source_is_in_the_key(tmp_path: Path, name: str) -> None:
    real = tmp_path / "real"
    (real / name).parent.mkdir(parents=True)
    (real / name).write_text("1")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "linked").symlink_to(real)
    before = digest_of_tree(tmp_path / "package")
    (real / "__pycache__").mkdir()
    (real / "__pycache__" / "x.py").write_text("")
    (real / "notes.txt").write_text("")
    assert digest_of_tree(tmp_path / "package") == before
    (real / name).write_text("2")
    changed = digest_of_tree(tmp_path / "package")
    (real / name).rename(real / f"other{Path(name).suffix}")
    assert len({before, changed, digest_of_tree(tmp_path / "package")}) == 3


def test_the_digest_covers_passes_and_templates() -> None:
    root = Path(compile_cache.__file__).resolve().parents[1]
    assert {"passes", "codegen", "ir"} <= {path.name for path in root.iterdir()}
    assert (root / "passes" / "manager.py").is_file()
    assert digest_of_tree(root / "passes") != digest_of_tree(root / "codegen")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QOQC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(compile_cache, "_CHANGED", [])
    return tmp_path / "cache"


def test_compiled_code_goes_into_the_private_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = activate(CPU)
    assert folder is not None
    assert folder == cache / "compiled" / digest(key_parts(CPU))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert os.environ["TRITON_CACHE_DIR"] == str(cache / "triton")
    assert {p.stat().st_mode & 0o777 for p in (cache, folder.parent, folder)} == {0o700}
    assert activate(CPU) == folder, "it takes its own choice for the user's"
    assert compile_cache.changed() == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    other = activate(CPU)
    assert other not in (None, folder)
    assert compile_cache.changed().startswith(" (changed since the last run: environment")
    assert digest(json.loads((folder / PARTS).read_text())) == folder.name


def test_directories_the_user_chose_are_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/also")
    assert activate(CPU) is None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"
    assert os.environ["TRITON_CACHE_DIR"] == "/also"


def test_keys_used_long_ago_go_first(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcd"]
    for age, folder in enumerate(folders):
        folder.mkdir()
        (folder / "code").write_bytes(bytes(1000))
        (folder / PARTS).write_text("{}")
        os.utime(folder / PARTS, (1e9 - age, 1e9 - age))
    assert keys_in_use(tmp_path) == folders
    assert evict(tmp_path, folders[3], limit=2500) == [folders[2]]
    assert keys_in_use(tmp_path) == [folders[0], folders[1], folders[3]]


def test_differences_are_named() -> None:
    old = {"torch": "2.11", "device": "x" * 200, "same": "1"}
    old["environment"] = json.dumps({"OMP_NUM_THREADS": "4", "TORCH_X": "1", "CC": "gcc"})
    new = {"torch": "2.12", "device": "y" * 200, "same": "1", "driver": "5"}
    new["environment"] = json.dumps({"OMP_NUM_THREADS": "8", "CXX": "c++", "CC": "gcc"})
    assert differences(old, new) == [
        "torch: 2.11 -> 2.12",
        "device (changed)",
        "driver: None -> 5",
        "environment: CXX unset -> c++, OMP_NUM_THREADS 4 -> 8, TORCH_X 1 -> unset",
    ]


def test_a_compiled_graph_is_an_error_if_it_must_be_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = [(0, 0)]
    monkeypatch.setattr(compile_count, "graphs_compiled", lambda: counts[-1])
    monkeypatch.setattr(compile_count, "_REQUIRED", [])
    with compile_count.graph_from_cache("g", required=True):
        counts.append((0, 1))
    with compile_count.graph_from_cache("g", required=False):
        counts.append((1, 1))
    with pytest.raises(NotCached, match="g was not in the cache of compiled graphs"):
        with compile_count.graph_from_cache("g", required=True):
            counts.append((2, 1))


def test_a_compiled_kernel_is_an_error_if_it_must_be_cached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile_count, "_REQUIRED", [])
    before = compile_count.count()
    listener = triton.knobs.compilation.listener
    event: dict[str, Any] = {"metadata": {}, "metadata_group": {}, "times": None}
    source = SimpleNamespace(name="gemm")
    listener(src=source, cache_hit=False, **event)
    listener(src=source, cache_hit=True, **event)
    made = compile_count.count() - before
    assert (made.kernels, made.kernels_cached) == (1, 1)
    with compile_count.graph_from_cache("g", required=True):
        pass
    listener(src=source, cache_hit=True, **event)
    with pytest.raises(NotCached, match="the kernel gemm was not in Triton's cache"):
        listener(src=source, cache_hit=False, **event)


def test_kernels_must_be_cached_with_eager_glue_too(monkeypatch: pytest.MonkeyPatch) -> None:
    required: list[bool] = []
    monkeypatch.setattr(compile_count, "_REQUIRED", required)
    linear = torch.nn.Sequential(torch.nn.Linear(128, 128)).requires_grad_(False)
    for wanted in (False, True):
        torch._dynamo.reset()
        options = {"glue": "eager", "require_cached": wanted}
        torch.compile(linear, backend="qoq", options=options)(torch.ones(2, 128))
        assert bool(required) == wanted


RUN = """
import json, sys, torch, qoqc
from qoqc.runtime.compile_count import count
model = qoqc.load(sys.argv[1], **json.loads(sys.argv[2]))
tokens = model.generate(torch.tensor([[1, 3, 56, 57]]), max_new_tokens=3, do_sample=False)
print(json.dumps([tokens[0].tolist(), count().graphs, count().graphs_cached]))
"""


@pytest.mark.slow
def test_a_fresh_process_compiles_nothing(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path / "artifact")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    }
    environment["QOQC_CACHE"] = str(tmp_path / "cache")

    def run(options: dict[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
        arguments = [str(tmp_path / "artifact"), json.dumps(options)]
        return subprocess.run(
            [sys.executable, "-c", RUN, *arguments],
            capture_output=True,
            text=True,
            env={**environment, **more},
        )

    assert "was not in the cache of compiled graphs" in run({"require_cached": True}).stderr
    # that left the prefill's graph in the cache: a fresh one for the rest
    environment["QOQC_CACHE"] = str(tmp_path / "other")
    cold = json.loads(run({}).stdout)
    assert cold[1] > 0
    warm = json.loads(run({"require_cached": True}).stdout)
    assert warm == [cold[0], 0, cold[1] + cold[2]]
    result = run({"require_cached": True, "kv_bits": 8})
    assert "was not in the cache of compiled graphs" in result.stderr, "an option changes the graph"
    result = run({"require_cached": True}, QOQC_FUTURE_SWITCH="1")
    assert "changed since the last run: environment" in result.stderr
