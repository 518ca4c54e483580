from __future__ import annotations

import dataclasses

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qoqc.codegen.build import build
from qoqc.codegen.family import Tile
from qoqc.codegen.kernels.gemm import GemmCall, call_of, launch
from qoqc.codegen.kernels.gemm_forms import GEMM
from qoqc.codegen.kernels.gemm_hopper import descriptor, schedule
from qoqc.codegen.kernels.gemm_hopper_tiles import (
    GEMM_HOPPER,
    candidates,
    heuristic,
    modelled_us,
    refuses,
    shared_bytes,
    tile_of,
)
from qoqc.codegen.kernels.gemm_plain import GEMM_PLAIN
from qoqc.codegen.kernels.gemm_ways import GEMM_WAYS
from qoqc.codegen.tuning.choose import bucket
from qoqc.ir import ops
from qoqc.ir.reference import int8_linear
from qoqc.ir.spec import LinearSpec
from qoqc.quant.weight import expand_int8
from qoqc.runtime.device import DeviceKey, device_key
from qoqc.runtime.workspace import zeroed_counters

H200 = DeviceKey("NVIDIA H200", 90, 132, 232448)
A100 = DeviceKey("NVIDIA A100", 80, 108, 166912)
SPEC = LinearSpec(4096, 4096, 128, torch.bfloat16)
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1536, 2048), (8, 16)]


def test_descriptors_are_those_that_triton_makes() -> None:
    first, second = torch.zeros(2, 3, 5, 256), torch.ones(2, 3, 5, 256)
    for x, kind in (
        (first.char(), gl.int8),
        (second.bfloat16(), gl.bfloat16),
        (first.char(), gl.int8),
    ):
        got = descriptor(x, (30, 256), (8, 128))
        layout = gl.NVMMASharedLayout.get_default_for([8, 128], kind)
        want = vars(TensorDescriptor(x, [30, 256], [256, 1], [8, 128], layout))
        assert type(got) is TensorDescriptor
        assert {**vars(got), "base": None} == {**want, "base": None}
        assert got.base is x


def test_a_descriptor_of_an_odd_address_is_of_a_copy() -> None:
    x = torch.arange(65, dtype=torch.int32)[1:]
    got = descriptor(x, (1, 64), (1, 32))
    assert got.base.data_ptr() % 16 == 0
    assert torch.equal(got.base, x)


@pytest.mark.parametrize(
    ("shape", "box"), [((0, 64), (1, 32)), ((4, 5), (1, 32)), ((4, 64), (3, 32))]
)
def test_what_tma_cannot_copy_is_refused(shape: tuple[int, int], box: tuple[int, int]) -> None:
    x = torch.zeros(shape, dtype=torch.int8)
    for _ in range(2):
        with pytest.raises((AssertionError, ValueError)):
            descriptor(x, shape, box)


def cut_tile(split: int, block_m: int = 16) -> Tile:
    return tile_of(block_m, (64, 1, 2), 4, split=split)


@pytest.mark.parametrize("tokens", [1, 16, 17, 100, 4096])
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("k_tiles", [1, 3, 32, 113])
@pytest.mark.parametrize("sms", [1, 7, 132])
def test_schedule_deals_every_step_once(tokens: int, split: int, k_tiles: int, sms: int) -> None:
    tile = cut_tile(split)
    plan = schedule(tokens, 1000, k_tiles, tile, sms)
    tiles = -(-tokens // 16) * -(-1000 // 64)
    steps = -(-k_tiles // (tile["WAYS"] * tile["UNROLL"]))
    assert 1 <= plan.parts <= max(1, min(split, steps))
    # each part of a cut tile is the first turn of a block of its own
    assert plan.cut * plan.parts <= plan.blocks <= sms
    # every block has a turn, and the turns are all parts and whole tiles
    turns = tiles + plan.cut * (plan.parts - 1)
    assert plan.blocks <= turns
    assert plan.cut <= tiles
    bounds = [i * steps // plan.parts for i in range(plan.parts + 1)]
    assert bounds[0] == 0
    assert bounds[-1] == steps
    assert all(a < b for a, b in zip(bounds[:-1], bounds[1:], strict=True)) or plan.parts == 1


def test_schedule_cuts_only_what_leaves_blocks_idle() -> None:
    assert schedule(16, 4096, 32, cut_tile(2), 132).cut == 64
    assert schedule(16, 4096, 32, cut_tile(4), 132).parts == 2
    assert schedule(16, 64 * 132, 32, cut_tile(2), 132).cut == 0
    assert schedule(16, 64 * 100, 32, cut_tile(2), 132).cut == 0
    whole_wave_and_ten = schedule(16, 64 * 142, 32, cut_tile(4), 132)
    assert (whole_wave_and_ten.blocks, whole_wave_and_ten.cut) == (132, 10)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128, 256, 512, 2048, 8192])
def test_candidates_are_legal(group_size: int, n: int, k: int, size: int) -> None:
    spec = dataclasses.replace(SPEC, in_features=k, out_features=n, group_size=group_size)
    tiles = candidates(spec, size, H200)
    assert heuristic(spec, size, H200) in tiles
    assert len(set(tiles)) == len(tiles) <= 48
    for tile in tiles:
        assert shared_bytes(spec, tile) <= H200.shared_bytes
        assert tile["STAGES"] >= 2
        assert modelled_us(spec, size, tile, H200) > 0


def test_the_model_ranks_as_the_clock_did() -> None:
    # microseconds measured on an H200, N = K = 4096, g128
    measured = {
        (16, tile_of(16, (64, 1, 2), 12)): 5.7,
        (64, tile_of(64, (64, 1, 2), 8)): 8.1,
        (1024, tile_of(256, (64, 2, 1), 4)): 24.6,
        (8192, tile_of(256, (64, 2, 1), 4)): 174.0,
    }
    for (size, tile), us in measured.items():
        assert modelled_us(SPEC, size, tile, H200) == pytest.approx(us, rel=0.1)


def test_tiles_of_192_channels_are_taken_where_they_fill_the_sms() -> None:
    # (6144, 4096) with 512 tokens on an H200: 128 of them in 20.9 us, 96 of 256 x 128 in 23.7
    wide = dataclasses.replace(SPEC, out_features=6144)
    assert [heuristic(wide, size, H200)["ROWS"] for size in (512, 4096)] == [3, 2]
    tile = tile_of(128, (64, 3, 1), 6)
    assert schedule(512, 6144, 32, tile, 132).blocks == 128
    assert modelled_us(wide, 512, tile, H200) == pytest.approx(20.9, rel=0.1)


@pytest.mark.parametrize(
    ("change", "device", "reason"),
    [
        ({}, A100, "sm_90, this is sm_80"),
        ({"dtype": torch.float32}, H200, "16-bit results"),
        ({"out_features": 4100}, H200, "N=4100"),
        ({"in_features": 4104}, H200, "K=4104"),
        ({"in_features": 0}, H200, "K=0"),
        ({"out_features": 0}, H200, "N=0"),
    ],
)
def test_refusals(change: dict[str, object], device: DeviceKey, reason: str) -> None:
    spec = dataclasses.replace(SPEC, **change)
    assert reason in (refuses(spec, device) or "")
    form, _ = GEMM.heuristic(spec, 1, device)
    assert form is GEMM_WAYS
    assert GEMM.heuristic(spec, 64, device)[0] is GEMM_PLAIN


def test_it_is_the_choice_on_hopper() -> None:
    assert refuses(SPEC, H200) is None
    for size in (1, 16, 64, 8192):
        assert GEMM.heuristic(SPEC, size, H200)[0] is GEMM_HOPPER


def test_counters_on_cpu_are_fresh() -> None:
    first = zeroed_counters(torch.device("cpu"), 3)
    first += 1
    assert zeroed_counters(torch.device("cpu"), 3).tolist() == [0, 0, 0]


def every_group() -> torch.Tensor:
    """All group words that packing admits: zero * scale <= 128, (15 - zero) * scale <= 127."""
    pairs = [
        (scale, zero)
        for scale in range(128)
        for zero in range(16)
        if zero * scale <= 128 and (15 - zero) * scale <= 127
    ]
    scale, zero = torch.tensor(pairs, dtype=torch.int32).unbind(1)
    return scale | ((128 - zero * scale) << 8)


def adversarial_call(m: int, n: int, k: int, group_size: int, device: torch.device) -> GemmCall:
    """Random codes, every (scale, zero) pair, saturated and zero activations."""
    generator = torch.Generator(device).manual_seed(m + n + k)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    words = every_group().to(device)
    xq = integers(-128, 128, m, k)
    xq[::3] = torch.where(integers(0, 2, *xq[::3].shape) == 1, 127, -128)
    xq[1::5] = 0
    grouped = group_size == 128
    tiles = (-(-n // 128), -(-k // 128))
    return call_of(
        xq.to(torch.int8),
        torch.rand(m, generator=generator, device=device),
        xq.sum(1, dtype=torch.int32),
        integers(0, 256, *tiles, 128, 64).to(torch.uint8),
        torch.rand(n, generator=generator, device=device),
        words[integers(0, len(words), tiles[1], n)] if grouped else None,
        None if grouped else integers(0, 16, n).int(),
        torch.randn(n, generator=generator, device=device).bfloat16(),
        torch.randn(m, n, generator=generator, device=device).bfloat16(),
        torch.bfloat16,
    )


def wanted(call: GemmCall) -> torch.Tensor:
    w8 = expand_int8(call.packed())
    return int8_linear(
        call.xq, call.token_scale, w8, call.channel_scale, call.bias, call.residual, call.spec.dtype
    )


def on_hopper(device: torch.device) -> DeviceKey:
    key = device_key(device)
    if key.arch != 90:
        pytest.skip("needs sm_90")
    return key


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize(("n", "k"), [(1000, 1024), (4104, 4096), (128, 14336), (8, 128)])
def test_adversarial(n: int, k: int, group_size: int, device: torch.device) -> None:
    key = on_hopper(device)
    for m in (1, 2, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 129, 255, 1000, 4097):
        call = adversarial_call(m, n, k, group_size, device)
        want = wanted(call)
        tiles = candidates(call.spec, bucket(m), key)
        for tile in tiles[:: max(1, len(tiles) // 3)]:
            got = launch(build(GEMM_HOPPER, call.spec, tile), call)
            assert torch.equal(got, want), (m, tile)


@pytest.mark.gpu
def test_a_cut_case_under_load_gives_one_result(device: torch.device) -> None:
    key = on_hopper(device)
    call = adversarial_call(61, 4096, 4096, 128, device)
    want = wanted(call)
    tile = next(t for t in candidates(call.spec, 64, key) if t["SPLIT"] == 2)
    kernel = build(GEMM_HOPPER, call.spec, tile)
    launch(kernel, call)
    load = torch.cuda.Stream()
    other = torch.randn(4096, 4096, device=device)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for i in range(1000):
        if i % 10 == 0:
            with torch.cuda.stream(load):
                other @ other
        wrong += (launch(kernel, call) != want).sum()
    torch.cuda.synchronize()
    assert wrong.item() == 0
    assert not zeroed_counters(device, 1024).any()


@pytest.mark.gpu
def test_replays_on_two_streams_do_not_meet(device: torch.device) -> None:
    key = on_hopper(device)
    calls = [adversarial_call(40 + i, 4096, 4096, 128, device) for i in range(2)]
    wants = [wanted(call) for call in calls]
    graphs, results = [], []
    for call in calls:
        tile = next(t for t in candidates(call.spec, 64, key) if t["SPLIT"] == 2)
        kernel = build(GEMM_HOPPER, call.spec, tile)
        launch(kernel, call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([launch(kernel, call) for _ in range(20)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for result, want in zip(results, wants, strict=True):
        assert all(torch.equal(y, want) for y in result)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    key = on_hopper(device)
    full = adversarial_call(512, 4096, 4096, 128, device)
    tiles = {m: heuristic(full.spec, bucket(m), key) for m in (1, 16, 64, 200, 512)}
    whole = launch(build(GEMM_HOPPER, full.spec, tiles[512]), full)
    for m, tile in tiles.items():
        cut = {
            name: getattr(full, name)[:m].clone()
            for name in ("xq", "token_scale", "token_sum", "residual")
        }
        part = launch(build(GEMM_HOPPER, full.spec, tile), dataclasses.replace(full, **cut))
        assert torch.equal(part, whole[:m]), m


@pytest.mark.gpu
def test_misaligned_tensors(device: torch.device) -> None:
    key = on_hopper(device)
    call = adversarial_call(5, 256, 256, 128, device)
    shifted = torch.empty(call.xq.numel() + 1, dtype=torch.int8, device=device)[1:].view(5, 256)
    shifted.copy_(call.xq)
    assert shifted.data_ptr() % 16
    got = launch(
        build(GEMM_HOPPER, call.spec, heuristic(call.spec, 8, key)),
        dataclasses.replace(call, xq=shifted),
    )
    assert torch.equal(got, wanted(call))


@pytest.mark.gpu
def test_any_token_count_through_the_op(device: torch.device) -> None:
    on_hopper(device)
    call = adversarial_call(3000, 1024, 512, 128, device)
    want = wanted(call)
    for m in (0, 1, 3, 33, 500, 3000):
        got = ops.w4a8_linear(
            call.xq[:m], call.token_scale[:m], call.token_sum[:m], call.qweight,
            call.channel_scale, call.word, None, call.bias, call.residual[:m],  # type: ignore[index]
            torch.bfloat16,
        )  # fmt: skip
        assert torch.equal(got, want[:m]), m
