"""`qoqc doctor`: a sound machine passes, every fault is named, and what runs is what would."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from qoqc.cli import doctor, doctor_device, main
from qoqc.codegen.build import OPS
from qoqc.codegen.tuning import table
from qoqc.ir.spec import AttentionSpec, KVSpec, LinearSpec
from qoqc.runtime.device import DeviceKey

A100 = DeviceKey("A100", 80, 108, 163 * 1024)
H100 = DeviceKey("H100", 90, 132, 227 * 1024)


def ask(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def check(found: dict[str, Any], name: str) -> dict[str, str]:
    (line,) = [line for line in found["checks"] if line["name"] == name]
    return dict(line)


def test_this_machine_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = ask(capsys)
    wrong = [line for line in found["checks"] if line["status"] == "problem"]
    assert (code, found["ok"], wrong) == (0, True, [])
    assert check(found, "torch")["found"] == torch.__version__
    assert {"python", "triton", "transformers", "numpy", "C compiler", "cache"} <= {
        line["name"] for line in found["checks"]
    }
    assert [line["runs"] for line in found["runs"] if line["work"] == "linear"] == ["torch._int_mm"]


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "_int_mm" in out
    assert out.splitlines()[-1] == "everything qoqc needs is here"


def fake_version(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    real = importlib.metadata.version

    def installed(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)


@pytest.mark.parametrize(
    "package, version, remedy",
    [
        ("torch", "2.10.1+cu128", "pip install 'torch<2.14,>=2.11'"),
        ("torch", "2.14.0", "pip install 'torch<2.14,>=2.11'"),
        ("transformers", "4.57.0", "pip install 'transformers>=5.17'"),
        ("triton", None, "pip install 'triton>=3.6'"),
    ],
)
def test_a_package_out_of_range_is_a_problem(
    package: str,
    version: str | None,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_version(monkeypatch, package, version)
    code, found = ask(capsys)
    line = check(found, package)
    assert (code, found["ok"], line["status"]) == (1, False, "problem")
    assert line["found"] == (version or "not installed")
    assert line["remedy"] == remedy
    assert found["runs"] == [], "modules that need the package are not imported"
    assert main(["doctor"]) == 1
    assert "1 to put right" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["2.13.0+cu130", "2.12.0.dev20260101"])
def test_local_builds_and_nightlies_count_by_their_number(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_version(monkeypatch, "torch", version)
    assert doctor.package(Requirement("torch>=2.11,<2.14")).status == "ok"


@pytest.mark.parametrize("interpret, status", [("0", "note"), ("1", "problem")])
def test_numpy_matters_to_the_interpreter_only(
    interpret: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_version(monkeypatch, "numpy", "2.4.0")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert doctor.package(Requirement("numpy<2.4")).status == status


def no_compiler(patch: pytest.MonkeyPatch, folder: Path) -> str:
    patch.setenv("PATH", str(folder))
    for variable in ("CC", "CXX"):
        patch.delenv(variable, raising=False)
    return "C compiler"


def wrong_compiler(patch: pytest.MonkeyPatch, folder: Path) -> str:
    patch.setenv("CXX", "no-such-compiler")
    return "C++ compiler"


def bad_switch(patch: pytest.MonkeyPatch, folder: Path) -> str:
    patch.setenv("QOQC_LOG", "LOUD")
    return "QOQC_LOG"


def cache_in_a_file(patch: pytest.MonkeyPatch, folder: Path) -> str:
    (folder / "file").touch()
    patch.setenv("QOQC_CACHE", str(folder / "file" / "cache"))
    return "cache"


@pytest.mark.parametrize("spoil", [no_compiler, wrong_compiler, bad_switch, cache_in_a_file])
def test_a_fault_is_named_with_a_remedy(
    spoil: Callable[[pytest.MonkeyPatch, Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = spoil(monkeypatch, tmp_path)
    code, found = ask(capsys)
    line = check(found, name)
    assert (code, line["status"]) == (1, "problem")
    assert line["remedy"]


def test_a_bad_switch_does_not_stop_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QOQC_LOG", "LOUD")
    command = [sys.executable, "-m", "qoqc", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert check(json.loads(done.stdout), "QOQC_LOG")["status"] == "problem"


def test_the_cache_is_measured_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv("QOQC_CACHE", str(folder))
    _, found = ask(capsys)
    assert "not there yet" in check(found, "cache")["found"]
    assert not folder.parent.exists()
    folder.mkdir(parents=True)
    (folder / "x").write_bytes(bytes(1500))
    _, found = ask(capsys)
    assert "1 files, 1.5 kB" in check(found, "cache")["found"]
    assert check(found, "cache")["status"] == "ok"
    folder.chmod(0o777)
    _, found = ask(capsys)
    assert check(found, "cache")["status"] == "note"


def fake_gpu(monkeypatch: pytest.MonkeyPatch, key: DeviceKey) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60 * 10**9, 80 * 10**9))
    monkeypatch.setattr(doctor_device, "device_key", lambda device: key)
    monkeypatch.setattr(doctor_device, "driver_version", lambda: "580.1")


@pytest.mark.parametrize(
    "arch, status, remedy",
    [(75, "problem", "--device cpu"), (89, "ok", ""), (120, "note", "plain")],
)
def test_a_gpu_is_judged_by_its_age(
    arch: int,
    status: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_gpu(monkeypatch, DeviceKey("Some GPU", arch, 64, 99 * 1024))
    code, found = ask(capsys)
    line = check(found, "cuda:0")
    assert (code, line["status"]) == (int(status == "problem"), status)
    assert line["found"] == f"Some GPU, sm_{arch}, 64 SMs, 60.0 GB of 80.0 GB free"
    assert remedy in line["remedy"]
    assert "driver 580.1" in check(found, "CUDA")["found"]
    has_runs = any(run["device"] == "cuda:0" for run in found["runs"])
    assert has_runs == (arch >= doctor_device.MIN_ARCH)


@pytest.mark.parametrize("key", [A100, H100])
def test_the_forms_are_those_a_launch_would_take(key: DeviceKey) -> None:
    lines = {line.work: line for line in doctor_device.gpu_runs("cuda:0", key)}
    op, (n, k) = OPS["w4a8_linear"], doctor_device.SHAPE
    for tokens, work in ((1, "linear g128, 1 token"), (512, "linear g128, 512 tokens")):
        spec = LinearSpec(k, n, 128, torch.bfloat16)
        form, _ = table.look_up(op, spec, tokens, key) or op.heuristic(spec, tokens, key)
        assert lines[work].runs == form.name
        refused = [form.name for form in op.forms if form.refuses(spec, key) is not None]
        assert all(f"{name}: " in lines[work].why for name in refused)
        assert bool(refused) == (key is A100), "the sm_90 form refuses an A100"
    attention, heads = OPS["attention_prefill"], AttentionSpec(8, KVSpec(2, 128, 128), torch.half)
    many = lines["many queries over pages"]
    assert many.runs == attention.usable(heads, key)[0].name
    first = lines["a prompt's first chunk"]
    for work in ("decode step", "few queries over pages", "rotate, append"):
        assert set(lines[work].runs.split(", ")) <= set(OPS)
    if key is H100:
        special = "attention_prefill with a mask, a window, a soft cap, 8 bits"
        assert many.why == f"by heuristic; {special}"
        assert first.why.endswith("qoqc serve from its pages")
    else:
        assert many.why == "by heuristic; attention_hopper: A100 is not of compute capability 9.0"
        assert first.why.endswith("by flash attention")


@pytest.mark.parametrize("build, remedy", [(None, "CPU build"), ("13.0", "CUDA_VISIBLE_DEVICES")])
def test_a_gpu_that_torch_cannot_use_is_a_problem(
    build: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor_device, "driver_version", lambda: "580.1")
    (line,) = doctor_device.checks()
    assert line.status == "problem"
    assert remedy in line.remedy


def test_the_driver_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: "/bin/nvidia-smi")

    def smi(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "580.82.07\n580.82.07\n", "")

    def broken(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 9, "NVIDIA-SMI has failed", "")

    def stuck(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 20)

    assert [doctor_device.driver_version(call) for call in (smi, broken, stuck)] == [
        "580.82.07",
        None,
        None,
    ]
    monkeypatch.setattr(shutil, "which", lambda command: None)
    assert doctor_device.driver_version(smi) is None
