from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.codegen.aot import Recorder, compile_for
from qoqc.codegen.build import FAMILIES
from qoqc.codegen.family import Family, Tile
from qoqc.codegen.kernels.quantize import QUANTIZE, QuantizeSpec

REPORT = Path(__file__).with_name("aot_report.py")

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def facts() -> list[Facts]:
    """What the machine code of every case looks like, compiled in one process for all tests."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(REPORT)], env=env, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def offenders(facts: list[Facts], *names: str) -> list[Facts]:
    shown = ("family", "arch", "spec", "tile", *names)
    return [{name: f[name] for name in shown} for f in facts if any(f[n] for n in names)]


def test_every_family_is_compiled_for_every_architecture(facts: list[Facts]) -> None:
    wanted = {name for name, family in FAMILIES.items() if family.trial is not None}
    only_hopper = {"gemm_hopper", "attention_hopper", "attention_unpack"}
    for arch in (80, 89, 90):
        found = {f["family"] for f in facts if f["arch"] == arch}
        assert found == (wanted if arch == 90 else wanted - only_hopper)


COLD_STACK = {"step_attend", "attention_hopper"}
"""Families that may keep values in local memory before their loops, never within: for heads of 256
channels there are not enough registers; a warpgroup of three cannot have those of the others."""


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_spills(family: str, facts: list[Facts]) -> None:
    seen = [f for f in facts if f["family"] == family]
    if family in COLD_STACK:
        assert offenders(seen, "spills_in_loops") == []
        assert all(f["stack"] <= 96 for f in seen), offenders(seen, "stack")
    else:
        assert offenders(seen, "stack", "local") == []


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_memory_fits_and_is_not_underestimated(family: str, facts: list[Facts]) -> None:
    for f in facts:
        if f["family"] == family:
            assert f["shared"] <= f["shared_limit"], f
            assert f["shared_estimate"] is None or f["shared"] <= f["shared_estimate"], f


def test_exact_families_hold_no_fma_and_no_flush_to_zero(facts: list[Facts]) -> None:
    # erf is a library function with both inside: its result is held to an error, not to bits
    exact = [
        f
        for f in facts
        if not FAMILIES[f["family"]].fp_fusion
        and not FAMILIES[f["family"]].tolerance
        and f["spec"].get("kind") != "gelu"
    ]
    assert exact
    assert offenders(exact, "fma", "flush") == []


def test_glue_loads_16_bytes_at_a_time(facts: list[Facts]) -> None:
    seen = [f for f in facts if f["family"] in ("norm_quantize", "act_quantize")]
    whole = [f for f in seen if f["spec"]["features"] % 128 == 0]
    assert whole and len(whole) < len(seen)
    for f in whole:
        assert f["global_loads"] == ["v4.b32"], f


def test_gemm_runs_on_integer_tensor_cores(facts: list[Facts]) -> None:
    for f in facts:
        if f["family"] in ("gemm_plain", "gemm_hopper"):
            assert f["wgmma" if f["arch"] == 90 else "mma"] > 0, f
        if f["family"] == "gemm_ways":
            assert f["mma"] > 0, f


def test_every_way_is_a_warp_that_loads_both_operands_as_matrices(facts: list[Facts]) -> None:
    seen = [f for f in facts if f["family"] == "gemm_ways"]
    assert seen
    for f in seen:
        assert f["mma_warps"] == [[f["tile"]["WAYS"], 1, 1]], f
        assert f["num_warps"] == f["tile"]["WAYS"], f
        # 512 bytes each: 64 of every channel, 64 of both halves of every token
        assert f["ldmatrix"] >= (f["tile"]["BLOCK_N"] + 2 * f["tile"]["BLOCK_M"]) // 8, f


def test_threads_hold_runs_of_four_weights_of_one_group(facts: list[Facts]) -> None:
    # what the inline PTX relies on; and one warp layout for both dots of a step
    for f in facts:
        if f["family"] in ("gemm_plain", "gemm_ways"):
            (layout,) = f["ptx_layouts"]
            assert layout == "#ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 4}>", f


def test_tiny_codes_are_made_of_runs_of_four(facts: list[Facts]) -> None:
    # of 16 columns and more, Triton multiplies values by wgmma: there threads hold runs of two
    tiny = [f for f in facts if f["family"] == "step_attend" and f["tiny_layouts"]]
    assert any(f["spec"]["heads"] == 16 for f in tiny)
    for f in tiny:
        assert all(re.fullmatch(r"#ttg.dot_op<.*kWidth = 4}>", x) for x in f["tiny_layouts"]), f


def test_weights_and_words_are_copied_asynchronously(facts: list[Facts]) -> None:
    for f in facts:
        if f["family"] == "gemm_plain" and f["spec"]["in_features"] % 128 == 0:
            assert f["async_copies"] > 0, f
        if f["family"] == "gemm_ways":
            ways, block_m, block_n = (f["tile"][n] for n in ("WAYS", "BLOCK_M", "BLOCK_N"))
            copied = [f"{ways}x{block_n}x64xi8", f"{ways}x{block_m}x64xi8"]
            copied += [f"{ways}x{block_n}xi32"] * (f["spec"]["group_size"] == 128)
            assert f["async_shapes"] == sorted(set(copied)), f


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Tile((("ROWS", 1), ("BLOCK_K", 64), ("LOOP", 0)))
    spec = QuantizeSpec(64, torch.bfloat16)
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    with pytest.raises(RuntimeError, match="unset it"):
        compile_for(QUANTIZE, spec, tile, 1, 90)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    mute = Family("mute", None, QUANTIZE.bind, QUANTIZE.heuristic, QUANTIZE.candidates, "")
    with pytest.raises(ValueError, match="family mute has no trial"):
        compile_for(mute, spec, tile, 1, 90)


def test_recorder_keeps_the_launch() -> None:
    recorder = Recorder(Tile(()))
    recorder((3,), "a", 2)
    assert (recorder.grid, recorder.arguments) == ((3,), ("a", 2))
