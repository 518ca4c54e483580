"""Linears of one token that quantize it as well: tiles, grids, and their results on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qoqc.codegen.aot import Recorder
from qoqc.codegen.build import build, runs
from qoqc.codegen.kernels.few_call import OP, FewCall, FewSpec, Outputs, launch
from qoqc.codegen.kernels.few_linear import (
    FEW_LINEAR,
    LARGEST_BLOCK_K,
    bind,
    candidates,
    heuristic,
    refuses,
    shared_bytes,
    start,
    tile_of,
    ways_of,
)
from qoqc.codegen.kernels.few_trial import definition, random_call
from qoqc.codegen.kernels.norm_call import NormSpec
from qoqc.codegen.kernels.pieces import INTERPRETED_DEVICE
from qoqc.ir.spec import LinearSpec
from qoqc.runtime.device import DeviceKey, device_key

H200 = DeviceKey("NVIDIA H200", 90, 132, 232448)
L40S = DeviceKey("NVIDIA L40S", 89, 142, 101376)
A100 = DeviceKey("NVIDIA A100", 80, 108, 166912)
BF16, FP16 = torch.bfloat16, torch.float16

RMS = NormSpec(4096, BF16, round_first=True, has_residual=True)
QKV = FewSpec(LinearSpec(4096, 6144, 128, BF16), RMS)
GATE_UP = FewSpec(LinearSpec(4096, 28672, 128, BF16, glu=True), RMS)
DOWN = FewSpec(LinearSpec(14336, 4096, 128, BF16))
SPECS = {
    "norm": QKV,
    "norm glu": GATE_UP,
    "long": DOWN,
    "longest": FewSpec(LinearSpec(LARGEST_BLOCK_K, 1024, 128, BF16)),
    "per channel": FewSpec(LinearSpec(4096, 1024, -1, FP16)),
    "per channel glu": FewSpec(LinearSpec(2048, 1024, -1, BF16, glu=True)),
    "bias residual": FewSpec(LinearSpec(1024, 1000, 128, BF16, True, True)),
    "fp32": FewSpec(LinearSpec(1024, 256, 128, torch.float32, True)),
    "odd tails": FewSpec(LinearSpec(328, 201, 128, BF16, True)),
    "one tile": FewSpec(LinearSpec(128, 8, 128, BF16)),
    "layer norm kept": FewSpec(
        LinearSpec(2000, 520, 128, BF16),
        NormSpec(2000, BF16, "layer", has_residual=True, has_bias=True, keep=True),
    ),
    "gemma": FewSpec(
        LinearSpec(2304, 4096, 128, BF16), NormSpec(2304, BF16, offset=1.0, keep=True)
    ),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("key", [H200, L40S, A100], ids=lambda key: key.name)
def test_tiles_fit(name: str, key: DeviceKey) -> None:
    spec = SPECS[name]
    tiles = candidates(spec, 1, key)
    assert heuristic(spec, 1, key) in tiles
    assert len(tiles) == len(set(tiles))
    if refuses(spec, key) is not None:
        assert (name, key) == ("longest", L40S)
        return
    for tile in tiles:
        assert shared_bytes(spec, tile) <= key.shared_bytes
        assert ways_of(tile["ROWS"], tile.num_warps) <= bind(spec, tile)["BLOCK_K"] // 128
        assert tile["DEPENDENT"] == (key.arch >= 90)
        # gate and up of a channel are in one step
        assert not spec.linear.glu or tile["ROWS"] % 16 == 0


def test_what_it_refuses() -> None:
    assert refuses(QKV, H200) is None
    assert "Gluon" in str(refuses(QKV, dataclasses.replace(H200, name=INTERPRETED_DEVICE)))
    assert "sm_75" in str(refuses(QKV, dataclasses.replace(H200, arch=75)))
    long = FewSpec(LinearSpec(LARGEST_BLOCK_K + 128, 64, 128, BF16))
    assert "registers" in str(refuses(long, H200))
    assert runs(OP, QKV, H200)
    assert not runs(OP, long, H200)


@pytest.mark.parametrize(("n", "blocks", "expected"), [(4096, 1, 132), (4096, 2, 264), (24, 1, 3)])
def test_a_grid_holds_no_more_blocks_than_steps(
    n: int, blocks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qoqc.codegen.kernels.few_linear.sm_count", lambda device: 132)
    call = random_call(FewSpec(LinearSpec(256, n, 128, BF16)), 2, torch.device("cpu"))
    recorder = Recorder(tile_of(8, 4, 2, blocks, H200))
    start(recorder, call, call.empty_outputs())
    assert recorder.grid == (expected, 2)
    # early: not while a graph is captured; steps of eight channels
    assert recorder.arguments[-2:] == (0, n // 8)


def test_no_token_launches_nothing() -> None:
    call = random_call(FewSpec(LinearSpec(256, 64, 128, BF16)), 0, torch.device("cpu"))
    recorder = Recorder(tile_of(8, 4, 2, 1, H200))
    start(recorder, call, call.empty_outputs())
    assert recorder.grid == ()


def on_gpu(device: torch.device, spec: FewSpec) -> DeviceKey:
    """The device's key; only a part with little shared memory may refuse a spec."""
    key = device_key(device)
    if (reason := refuses(spec, key)) is not None:
        assert "shared memory" in reason and key.arch != 90, reason
        pytest.skip(reason)
    return key


def check(call: FewCall, got: Outputs) -> None:
    """Equal bit for bit; silu(gate), and then its product, may each fall to the other side of a
    border of rounding, and behind a norm an integer may, which a sum over K hardly shows."""
    for result, want in zip(got, definition(call), strict=True):
        if call.norm is None and not call.spec.linear.glu:
            assert torch.equal(result, want)
        elif call.norm is None:
            bound = 2 * torch.finfo(result.dtype).eps + 1e-5
            torch.testing.assert_close(result, want, rtol=bound, atol=1e-30)
        else:
            bound = 1e-2 * want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(result, want, rtol=0.0, atol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_every_tile_gives_the_definition(name: str, device: torch.device) -> None:
    spec = SPECS[name]
    key = on_gpu(device, spec)
    tiles = candidates(spec, 1, key)
    for tile in {heuristic(spec, 1, key), *tiles[:: max(1, len(tiles) // 4)]}:
        for tokens in (1, 2, 3):
            call = random_call(spec, tokens, device)
            check(call, launch(build(FEW_LINEAR, spec, tile), call))


@pytest.mark.gpu
@pytest.mark.parametrize("value", [0.0, 1e4, float("nan"), float("inf")])
def test_unusual_tokens(value: float, device: torch.device) -> None:
    spec = FewSpec(LinearSpec(1024, 256, 128, BF16))
    key = on_gpu(device, spec)
    call = random_call(spec, 1, device)
    call.x[0, 7 if value != 0.0 else slice(None)] = value
    (y, *_), (want, *_) = (
        launch(build(FEW_LINEAR, spec, heuristic(spec, 1, key)), call),
        definition(call),
    )
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.nan_to_num(), want.nan_to_num())


@pytest.mark.gpu
def test_a_graph_of_dependent_launches_gives_one_result(device: torch.device) -> None:
    """Each launch reads what the one before wrote, and starts before that one has ended."""
    spec = FewSpec(LinearSpec(4096, 4096, 128, BF16))
    key = on_gpu(device, spec)
    kernel = build(FEW_LINEAR, spec, heuristic(spec, 1, key))
    call = random_call(spec, 1, device)

    def chain() -> torch.Tensor:
        x = call.x
        for _ in range(20):
            x = launch(kernel, dataclasses.replace(call, x=x))[0]
        return x

    want = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(50):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)
