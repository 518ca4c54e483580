from __future__ import annotations

import pytest
import torch

from qoqc.codegen.build import build
from qoqc.codegen.kernels.gemm import launch
from qoqc.codegen.kernels.gemm_plain import GEMM_PLAIN, candidates, heuristic, shared_bytes
from qoqc.codegen.kernels.gemm_trial import random_call
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey, device_key

DEVICES = (
    DeviceKey("A100", 80, 108, 163 * 1024),
    DeviceKey("L40S", 89, 142, 99 * 1024),
    DeviceKey("H200", 90, 132, 227 * 1024),
)


@pytest.mark.parametrize("key", DEVICES, ids=lambda key: key.name)
@pytest.mark.parametrize("size", [1, 16, 32, 64, 128, 1024, 8192])
@pytest.mark.parametrize("n", [1, 128, 4096, 28672])
def test_heuristic_fits_and_is_a_candidate(key: DeviceKey, size: int, n: int) -> None:
    spec = LinearSpec(4096, n, 128, torch.bfloat16)
    tile = heuristic(spec, size, key)
    assert shared_bytes(spec, tile) <= key.shared_bytes
    assert tile["PTX"] == 1
    assert tile in candidates(spec, size, key)


@pytest.mark.gpu
def test_a_changing_batch_compiles_nothing_new(device: torch.device) -> None:
    spec = LinearSpec(256, 128, 128, torch.bfloat16)
    kernel = build(GEMM_PLAIN, spec, heuristic(spec, 16, device_key(device)))
    for m in (1, 2, 3, 16):
        launch(kernel, random_call(spec, m, device))
    compiled = kernel.fn.device_caches[device.index or 0][0]
    assert len(compiled) == 1
