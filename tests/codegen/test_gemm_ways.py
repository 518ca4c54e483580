from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from qoqc.codegen.build import build
from qoqc.codegen.family import Tile
from qoqc.codegen.kernels.gemm import GemmCall, launch
from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.kernels.gemm_plain import GEMM_PLAIN
from qoqc.codegen.kernels.gemm_trial import random_call
from qoqc.codegen.kernels.gemm_ways import (
    GEMM_WAYS,
    candidates,
    heuristic,
    shared_bytes,
    start,
    tile_of,
)
from qoqc.ir.reference import int8_linear
from qoqc.ir.spec import LinearSpec
from qoqc.quant.pack import pack_nibbles
from qoqc.quant.weight import expand_int8
from qoqc.runtime.device import DeviceKey, device_key

GroupSize = Literal[128, -1]
FORMATS: tuple[GroupSize, ...] = (128, -1)
DEVICES = (
    DeviceKey("A100", 80, 108, 163 * 1024),
    DeviceKey("L40S", 89, 142, 99 * 1024),
    DeviceKey("H200", 90, 132, 227 * 1024),
)
# every (scale, zero) that keeps both ends of the grid within int8, and groups of nothing but zeros
PAIRS = [(s, z) for s in range(256) for z in range(16) if z * s <= 128 and (15 - z) * s <= 127]


def multiplied(call: GemmCall, tile: Tile) -> torch.Tensor:
    return launch(build(GEMM_WAYS, call.spec, tile), call).cpu()


def reference(call: GemmCall, w8: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, with the weight of the call or another."""
    w8 = expand_int8(call.packed()) if w8 is None else w8
    factors = (call.channel_scale, call.bias, call.residual, call.spec.dtype)
    return int8_linear(call.xq, call.token_scale, w8, *factors).cpu()


@pytest.mark.parametrize("key", DEVICES, ids=lambda key: key.name)
@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 64, 8192])
@pytest.mark.parametrize("n", [1, 128, 1024, 4096, 28672])
def test_tiles_fit_and_hold_the_tokens(key: DeviceKey, size: int, n: int) -> None:
    spec = LinearSpec(4096, n, 128, torch.bfloat16)
    tiles = candidates(spec, size, key)
    assert tiles[0] == heuristic(spec, size, key)
    assert len(set(tiles)) == len(tiles)
    assert {tile["WAYS"] for tile in tiles} == ({4} if size > 32 else {4, 8})
    assert len(tiles) == 1 if size > 32 else len(tiles) > 4
    for tile in tiles:
        assert shared_bytes(spec, tile) <= key.shared_bytes
        assert tile["PTX"] == 1
        assert tile.num_warps == tile["WAYS"]
        assert tile["BLOCK_M"] == min(32, max(8, size))


def test_the_tile_that_was_measured_is_the_heuristics() -> None:
    tile = heuristic(LinearSpec(4096, 4096, 128, torch.bfloat16), 1, DEVICES[2])
    assert (tile["BLOCK_M"], tile["BLOCK_N"], tile["WAYS"], tile.num_stages) == (8, 32, 4, 4)


def test_blocks_widen_where_enough_are_left() -> None:
    widths = [
        heuristic(LinearSpec(4096, n, 128, torch.bfloat16), 1, DEVICES[2])["BLOCK_N"]
        for n in (128, 2048, 4096, 6144, 8192, 28672)
    ]
    assert widths == [16, 16, 32, 32, 64, 64]


def test_a_few_tokens_take_this_form() -> None:
    spec = LinearSpec(4096, 4096, 128, torch.bfloat16)
    forms = [GEMM.heuristic(spec, size, DEVICES[0])[0] for size in (1, 8, 16, 32, 8192)]
    assert forms == [GEMM_WAYS] * 3 + [GEMM_PLAIN] * 2


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("m", [0, 1, 2, 7, 8, 15, 16, 17])
def test_token_counts(m: int, group_size: GroupSize, device: torch.device) -> None:
    spec = LinearSpec(712, 131, group_size, torch.bfloat16, has_bias=True, has_residual=True)
    call = random_call(spec, m, device)
    assert torch.equal(multiplied(call, heuristic(spec, m, device_key(device))), reference(call))


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("block_m", [8, 16, 32])
def test_blocks_of_tokens(block_m: int, group_size: GroupSize, device: torch.device) -> None:
    spec = LinearSpec(384, 40, group_size, torch.float16, has_bias=True, has_residual=True)
    tile = tile_of(block_m, 16, 4, 2, device_key(device))
    for m in (1, block_m, 2 * block_m + 1):
        call = random_call(spec, m, device)
        assert torch.equal(multiplied(call, tile), reference(call)), m


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("ways", [4, 8])
@pytest.mark.parametrize("k", [1, 127, 128, 300, 512, 516, 1024, 1100, 1920])
def test_k_tiles_shared_among_ways(
    k: int, ways: int, group_size: GroupSize, device: torch.device
) -> None:
    spec = LinearSpec(k, 40, group_size, torch.float32)
    call = random_call(spec, 3, device)
    # whatever lies beyond the end of K must not count, and random_call fills it with codes
    assert torch.equal(
        multiplied(call, tile_of(8, 16, ways, 3, device_key(device))), reference(call)
    )


@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("n", [1, 127, 129, 272])
@pytest.mark.parametrize("block_n", [16, 128])
def test_tails_of_n(n: int, block_n: int, group_size: GroupSize, device: torch.device) -> None:
    spec = LinearSpec(640, n, group_size, torch.bfloat16, has_bias=True)
    call = random_call(spec, 2, device)
    tile = tile_of(8, block_n, 4, 2, device_key(device))
    assert torch.equal(multiplied(call, tile), reference(call))


def saturated(k: int, device: torch.device) -> torch.Tensor:
    """int8 [6, k]: both ends of the quantizer, the one value beyond them, and mixtures."""
    rows = torch.tensor([[127, 127], [-127, -127], [-128, -128], [127, -128], [0, -128], [-127, 0]])
    return rows.repeat(1, -(-k // 2))[:, :k].to(torch.int8).to(device)


def with_tokens(call: GemmCall, xq: torch.Tensor) -> GemmCall:
    return dataclasses.replace(call, xq=xq, token_sum=xq.sum(1, dtype=torch.int32))


def test_every_scale_and_zero(device: torch.device) -> None:
    n, k_tiles = len(PAIRS), 5
    k = k_tiles * 128
    spec = LinearSpec(k, n, 128, torch.float32)
    # channel i has pair i + t in its tile t; even channels hold all codes, odd ones their extremes
    pair = torch.tensor([PAIRS[(i + t) % n] for t in range(k_tiles) for i in range(n)])
    scale, zero = pair.view(k_tiles, n, 2).permute(2, 1, 0).int()  # [N, K/128] each
    code = torch.arange(k) % 16
    q4 = torch.where(torch.arange(n)[:, None] % 2 == 0, code, (code % 2) * 15).to(torch.uint8)
    q4[::7] = zero[::7].repeat_interleave(128, 1).to(torch.uint8)  # channels of zeros
    each = scale.repeat_interleave(128, 1), zero.repeat_interleave(128, 1)
    w8 = (q4.int() - each[1]) * each[0]
    assert (int(w8.min()), int(w8.max())) == (-128, 126)  # no pair makes the prime 127
    call = with_tokens(random_call(spec, 6, device), saturated(k, device))
    call = dataclasses.replace(
        call,
        qweight=pack_nibbles(q4).to(device),
        word=(scale | ((128 - zero * scale) << 8)).t().contiguous().to(device),
    )
    want = reference(call, w8.to(torch.int8).to(device))
    for block_n, ways in ((16, 8), (64, 4)):
        assert torch.equal(multiplied(call, tile_of(8, block_n, ways, 3, device_key(device))), want)


def test_every_channel_zero(device: torch.device) -> None:
    n, k = 48, 520
    spec = LinearSpec(k, n, -1, torch.float32)
    zero = torch.arange(n).int() % 16
    code = torch.stack((torch.arange(k) % 16, torch.zeros(k), torch.full((k,), 15))).to(torch.uint8)
    q4 = code[torch.arange(n) // 16]
    call = with_tokens(random_call(spec, 6, device), saturated(k, device))
    call = dataclasses.replace(call, qweight=pack_nibbles(q4).to(device), word=zero.to(device))
    want = reference(call, (q4.int() - zero[:, None]).to(torch.int8).to(device))
    assert torch.equal(multiplied(call, tile_of(8, 16, 4, 3, device_key(device))), want)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses of the elements that interpreted kernels load and store."""
    addresses: list[int] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        addresses.extend(ptrs.data[mask.data].tolist())
        return load(self, ptrs, mask, *rest)

    def noted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses.extend(ptrs.data[mask.data].tolist())
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    return addresses


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches Triton's interpreter")
@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 640), (7, 33, 200), (9, 130, 520), (8, 32, 512), (2, 33, 512)]
)
def test_nothing_outside_the_tensors_is_touched(
    m: int, n: int, k: int, group_size: GroupSize, touched: list[int], device: torch.device
) -> None:
    spec = LinearSpec(k, n, group_size, torch.bfloat16, has_bias=True, has_residual=True)
    call, tile = random_call(spec, m, device), tile_of(8, 16, 4, 2, device_key(device))
    y = call.empty_out()
    start(build(GEMM_WAYS, spec, tile), call, y)
    names = ["xq", "token_scale", "qweight", "channel_scale", "word", "bias", "residual"]
    tensors = {name: getattr(call, name) for name in names} | {"y": y}
    if group_size == -1:
        tensors["token_sum"] = call.token_sum
    left = set(touched)
    for name, tensor in tensors.items():
        first = tensor.data_ptr()
        whole = set(range(first, first + tensor.nbytes, tensor.element_size()))
        # padding of the weight along N is no work either
        assert whole <= left or name == "qweight", name
        assert whole & left, name
        left -= whole
    assert not left


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", FORMATS)
@pytest.mark.parametrize("size", [1, 16, 32])
def test_candidates_on_the_device(size: int, group_size: GroupSize, device: torch.device) -> None:
    spec = LinearSpec(4224, 1000, group_size, torch.bfloat16, has_bias=True, has_residual=True)
    call = random_call(spec, size, device)
    want = reference(call)
    for tile in candidates(spec, size, device_key(device)):
        for _ in range(20):  # a race may spare the first run
            assert torch.equal(multiplied(call, tile), want), tile


@pytest.mark.gpu
def test_a_changing_batch_compiles_nothing_new(device: torch.device) -> None:
    spec = LinearSpec(256, 128, 128, torch.bfloat16)
    kernel = build(GEMM_WAYS, spec, heuristic(spec, 16, device_key(device)))
    for m in (1, 2, 3, 16):
        launch(kernel, random_call(spec, m, device))
    compiled = kernel.fn.device_caches[device.index or 0][0]
    assert len(compiled) == 1
