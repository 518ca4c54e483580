from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch

from qoqc.codegen.kernels.gemm_trial import random_call
from qoqc.codegen.roofline import (
    TOKENS,
    Work,
    gemm_bytes,
    gemm_operations,
    gemm_work,
    limits_of,
)
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey

H200 = DeviceKey("NVIDIA H200", 90, 132, 227 * 1024)
SPEC = LinearSpec(4096, 6144, 128, torch.bfloat16)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("residual", [False, True])
def test_bytes_are_those_of_the_tensors(group_size: int, residual: bool) -> None:
    spec = LinearSpec(384, 200, group_size, torch.float16, has_residual=residual)
    call = random_call(spec, 7, torch.device("cpu"))
    values = (getattr(call, field.name) for field in dataclasses.fields(call))
    tensors = [*(v for v in values if isinstance(v, torch.Tensor)), call.empty_out()]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    assert gemm_bytes(spec).subs(TOKENS, 7) == moved


def test_operations() -> None:
    assert gemm_operations(SPEC).subs(TOKENS, 3) == 2 * 3 * 4096 * 6144


def test_padding_of_tiles_is_work() -> None:
    work = gemm_work(LinearSpec(200, 100, 128, torch.bfloat16), 16, 64)
    assert work.operations.subs(TOKENS, 17) == 2 * 32 * 128 * 256
    assert work.blocks.subs(TOKENS, 17) == 4


def test_weights_are_read_again_by_every_row_of_blocks() -> None:
    work = gemm_work(SPEC, 128, 128)
    once, twice = (float(work.l2.subs(TOKENS, m)) for m in (128, 256))
    weights = 6144 * 4096 // 2 + 4 * 6144 * (4096 // 128 + 1)
    assert twice - once > weights
    assert float(work.memory.subs(TOKENS, 256) - work.memory.subs(TOKENS, 128)) < weights


def test_partial_sums_are_work() -> None:
    whole, split = gemm_work(SPEC, 64, 128), gemm_work(SPEC, 64, 128, split=4)
    assert split.blocks == 4 * whole.blocks
    assert sympy.expand(split.l2 - whole.l2) == 4 * 8 * 6144 * TOKENS


def test_the_last_wave_counts() -> None:
    zero, one = sympy.Integer(0), sympy.Integer(1)
    work = Work(zero, zero, one * 10**15, TOKENS)
    full = work.seconds(132, H200)
    assert full == pytest.approx(1e15 / 1979e12)
    assert work.seconds(133, H200) == pytest.approx(full * 264 / 133)
    assert work.seconds(66, H200) == pytest.approx(full * 2)


def test_half_of_the_sms_draw_the_full_rate() -> None:
    zero = sympy.Integer(0)
    work = Work(sympy.Integer(10**10), zero, zero, TOKENS)
    assert work.seconds(132, H200) == work.seconds(66, H200) == pytest.approx(1e10 / 4.69e12)
    assert work.seconds(33, H200) == pytest.approx(2e10 / 4.69e12)
    assert work.seconds(0, H200) == 0


@pytest.mark.parametrize("size", [1, 64, 1024, 8192])
def test_no_tiling_beats_the_limit(size: int) -> None:
    limits = limits_of(H200)
    least = max(
        float(gemm_bytes(SPEC).subs(TOKENS, size)) / limits.read,
        float(gemm_operations(SPEC).subs(TOKENS, size)) / limits.int8,
    )
    for block_m in (16, 64, 128):
        assert gemm_work(SPEC, block_m, 128).seconds(size, H200) >= least


def test_limits_by_name_and_by_architecture() -> None:
    assert limits_of(H200).int8 == 1979e12
    assert limits_of(DeviceKey("NVIDIA A100-SXM4-80GB", 80, 108, 0)).int8 == 624e12
    for arch in (75, 80, 86, 87, 89, 90, 100, 120):
        unknown = limits_of(DeviceKey("another", arch, 100, 0))
        assert 0 < unknown.read < unknown.l2 < unknown.int8
    # a part that is known is not slower than what is assumed of its architecture
    for name, arch, sms in (("H200", 90, 132), ("A100", 80, 108), ("L40S", 89, 142)):
        known, unknown = (limits_of(DeviceKey(n, arch, sms, 0)) for n in (name, "another"))
        assert known.read >= unknown.read
        assert known.int8 >= unknown.int8
