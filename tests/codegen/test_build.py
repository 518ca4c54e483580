from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from qoqc.codegen import build as building
from qoqc.codegen.build import FAMILIES, build, built_kernels, dump_kernels, generate
from qoqc.codegen.family import Family, Tile
from qoqc.codegen.kernels.act_quantize import ACT_QUANTIZE, ActSpec
from qoqc.codegen.kernels.few_call import FewSpec
from qoqc.codegen.kernels.few_linear import FEW_LINEAR
from qoqc.codegen.kernels.gemm_hopper_tiles import GEMM_HOPPER
from qoqc.codegen.kernels.gemm_plain import GEMM_PLAIN
from qoqc.codegen.kernels.gemm_ways import GEMM_WAYS
from qoqc.codegen.kernels.kv_round import KV_ROUND, RoundSpec
from qoqc.codegen.kernels.norm_call import NormSpec
from qoqc.codegen.kernels.norm_quantize import NORM_QUANTIZE
from qoqc.codegen.kernels.quantize import QUANTIZE, QuantizeSpec, launch
from qoqc.ir.spec import LinearSpec
from qoqc.quant.activation import quantize_act
from qoqc.runtime.device import DeviceKey, device_key

SPEC = QuantizeSpec(40, torch.float32)
INTERPRETER = device_key(torch.device("cpu"))
H200 = DeviceKey("H200", 90, 132, 227 * 1024)

GOLDEN = Path(__file__).parent / "golden"
# one per family and notable flag set; `pytest --accept` writes them anew
GOLDENS: dict[str, tuple[Family, object, int, DeviceKey]] = {
    "quantize": (QUANTIZE, QuantizeSpec(4096, torch.bfloat16), 16, H200),
    "quantize_loop": (QUANTIZE, QuantizeSpec(20000, torch.float16), 16, H200),
    "norm_quantize": (
        NORM_QUANTIZE,
        NormSpec(4096, torch.bfloat16, round_first=True, has_residual=True),
        16,
        H200,
    ),
    "norm_quantize_loop": (
        NORM_QUANTIZE,
        NormSpec(12288, torch.float16, "layer", 1e-5, has_bias=True, keep=True),
        16,
        H200,
    ),
    "act_quantize": (ACT_QUANTIZE, ActSpec(14336, torch.bfloat16), 16, H200),
    "act_quantize_loop": (ACT_QUANTIZE, ActSpec(20480, torch.float16, "gelu", False), 16, H200),
    "gemm_g128": (GEMM_PLAIN, LinearSpec(4096, 4096, 128, torch.bfloat16), 16, H200),
    "gemm_per_channel_bias_residual": (
        GEMM_PLAIN,
        LinearSpec(4096, 4096, -1, torch.float16, has_bias=True, has_residual=True),
        4096,
        H200,
    ),
    "gemm_hopper_g128": (GEMM_HOPPER, LinearSpec(4096, 4096, 128, torch.bfloat16), 64, H200),
    "gemm_hopper_per_channel_bias_residual": (
        GEMM_HOPPER,
        LinearSpec(4096, 28672, -1, torch.float16, has_bias=True, has_residual=True),
        4096,
        H200,
    ),
    "few_linear_norm_glu": (
        FEW_LINEAR,
        FewSpec(
            LinearSpec(4096, 28672, 128, torch.bfloat16, glu=True),
            NormSpec(4096, torch.bfloat16, round_first=True, has_residual=True),
        ),
        1,
        H200,
    ),
    "few_linear_per_channel": (
        FEW_LINEAR,
        FewSpec(LinearSpec(14336, 4096, -1, torch.float16, has_bias=True, has_residual=True)),
        1,
        H200,
    ),
    "gemm_tails_interpreted": (
        GEMM_PLAIN,
        LinearSpec(200, 72, 128, torch.bfloat16, has_bias=True),
        4,
        INTERPRETER,
    ),
    "gemm_ways_g128": (GEMM_WAYS, LinearSpec(4096, 4096, 128, torch.bfloat16), 1, H200),
    "gemm_ways_tails": (
        GEMM_WAYS,
        LinearSpec(1096, 201, -1, torch.float16, has_bias=True, has_residual=True),
        16,
        H200,
    ),
}


def tile(rows: int = 1) -> Tile:
    return Tile((("ROWS", rows), ("BLOCK_K", 64), ("LOOP", 0), ("DEPENDENT", 0)), num_warps=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QOQC_CACHE", str(tmp_path))
    monkeypatch.setattr(building, "_BUILT", {})
    return tmp_path / "kernels"


def test_one_file_per_source_and_one_kernel_per_key(cache: Path) -> None:
    first = build(QUANTIZE, SPEC, tile())
    assert build(QUANTIZE, QuantizeSpec(40, torch.float32), tile()) is first
    other = build(QUANTIZE, SPEC, tile(rows=2))
    assert other.path != first.path
    assert sorted(p.name for p in cache.iterdir()) == sorted([first.path.name, other.path.name])
    assert first.path.parent == cache
    assert first.path.read_text() == first.source
    assert built_kernels() == (first, other)


def test_the_name_depends_on_the_triton_version(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(QUANTIZE, SPEC, tile())
    monkeypatch.setattr(building, "_BUILT", {})
    monkeypatch.setattr(triton, "__version__", "0.0")
    second = build(QUANTIZE, SPEC, tile())
    assert second.source == first.source
    assert second.path != first.path


@pytest.mark.parametrize("damage", ["", "raise SystemExit('damaged')\n", "\x00"])
def test_a_damaged_file_is_replaced_and_never_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, damage: str
) -> None:
    path = build(QUANTIZE, SPEC, tile()).path
    path.write_text(damage)
    monkeypatch.setattr(building, "_BUILT", {})
    kernel = build(QUANTIZE, SPEC, tile())
    assert path.read_text() == kernel.source
    assert [p.name for p in cache.iterdir()] == [path.name]
    x = torch.randn(3, 40)
    assert torch.equal(launch(kernel, x.to(device))[0].cpu(), quantize_act(x)[0])


def test_a_failed_write_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        build(QUANTIZE, SPEC, tile())
    assert list(cache.iterdir()) == []


def test_dump_writes_the_sources(cache: Path, tmp_path: Path) -> None:
    kernel = build(QUANTIZE, SPEC, tile())
    dump_kernels(None)
    dump_kernels(str(tmp_path / "dump"))
    assert (tmp_path / "dump" / "kernels" / kernel.path.name).read_text() == kernel.source


def test_families_are_named_after_their_key() -> None:
    assert all(name == family.name for name, family in FAMILIES.items())


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    family, spec, size, key = GOLDENS[name]
    text = generate(family, spec, family.heuristic(spec, size, key))
    path = GOLDEN / f"{name}.py"
    if request.config.getoption("--accept"):
        path.write_text(text)
    assert text == path.read_text(), (
        f"generated text changed; review and run pytest --accept {path}"
    )


def test_goldens_have_no_stray_files() -> None:
    assert {p.stem for p in GOLDEN.glob("*.py")} == set(GOLDENS)


@pytest.mark.parametrize("name", GOLDENS)
def test_generated_files_import_nothing_else(name: str) -> None:
    tree = ast.parse((GOLDEN / f"{name}.py").read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    always = ["import torch", "import triton", "import triton.language as tl"]
    assert [ast.unparse(n) for n in imports[:3]] == always
    further = [n.module for n in imports[3:] if isinstance(n, ast.ImportFrom)]
    assert len(further) == len(imports) - 3
    assert all(str(module).startswith("triton.") for module in further)
    # layouts, warp groups and TMA are Gluon's; the kernels around a GEMM start while it ends
    in_gluon = "hopper" in name or "few" in name
    assert any("gluon" in str(module) for module in further) == in_gluon
    assert bool(further) == (in_gluon or "quantize" in name)


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        (QUANTIZE, SPEC),
        (NORM_QUANTIZE, NormSpec(40, torch.bfloat16, offset=1.0, has_residual=True, keep=True)),
        pytest.param(
            NORM_QUANTIZE,
            NormSpec(8200, torch.float32, "layer", has_bias=True),
            marks=pytest.mark.slow,
        ),
        (ACT_QUANTIZE, ActSpec(40, torch.bfloat16, "gelu_tanh")),
        pytest.param(
            ACT_QUANTIZE,
            ActSpec(16400, torch.float32, "gelu", gated=False),
            marks=pytest.mark.slow,
        ),
        (GEMM_PLAIN, LinearSpec(200, 72, 128, torch.bfloat16, has_bias=True)),
        (GEMM_PLAIN, LinearSpec(128, 130, -1, torch.float32, has_residual=True)),
        (GEMM_WAYS, LinearSpec(200, 72, 128, torch.bfloat16, has_bias=True)),
        (KV_ROUND, RoundSpec(40, 4, torch.bfloat16)),
        (GEMM_WAYS, LinearSpec(640, 130, -1, torch.float32, has_residual=True)),
    ],
)
def test_a_generated_file_checks_itself(
    family: Family, spec: object, cache: Path, device: torch.device
) -> None:
    kernel = build(family, spec, family.heuristic(spec, 4, device_key(device)))
    run = subprocess.run(
        [sys.executable, str(kernel.path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "equal to torch" in run.stdout


def test_a_wrong_kernel_fails_its_own_check(cache: Path, device: torch.device) -> None:
    kernel = build(QUANTIZE, SPEC, tile())
    wrong = kernel.source.replace("* 127.0", "* 126.0")
    assert wrong != kernel.source
    path = kernel.path.with_name("wrong.py")
    path.write_text(wrong)
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert run.returncode != 0
    assert "wrong integers" in run.stderr


def test_specs_with_the_same_facts_share_a_kernel(cache: Path) -> None:
    spec = dataclasses.replace(SPEC)
    assert spec is not SPEC
    assert build(QUANTIZE, spec, tile()) is build(QUANTIZE, SPEC, tile())
