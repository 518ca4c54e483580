"""The sm_90 form of attention over pages: on a GPU against the definition; its choice anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qoqc.codegen.build import build
from qoqc.codegen.family import Kernel, Tile
from qoqc.codegen.kernels import attention_hopper
from qoqc.codegen.kernels.attention import Call, trial_call
from qoqc.codegen.kernels.attention_forms import ATTENTION, faster_than_flash
from qoqc.codegen.kernels.attention_hopper import ATTENTION_HOPPER, launch
from qoqc.codegen.kernels.attention_unpack import ATTENTION_UNPACK
from qoqc.ir import kv_reference
from qoqc.ir.spec import PAGE, AttentionSpec, KVSpec
from qoqc.runtime.device import DeviceKey, device_key

H200 = DeviceKey("NVIDIA H200", 90, 132, 227 * 1024)
A100 = DeviceKey("NVIDIA A100", 80, 108, 163 * 1024)
BF16, FP16 = torch.bfloat16, torch.float16
SPEC = AttentionSpec(8, KVSpec(2, 128, 128), BF16, causal=True)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv": KVSpec(2, 128, 128, 8)}, "heads of 128 and 128 channels in 8 bits"),
        ({"kv": KVSpec(2, 256, 256)}, "heads of 256"),
        ({"kv": KVSpec(2, 128, 64)}, "heads of 128 and 64"),
        ({"dtype": torch.float32}, "queries of torch.float32"),
        ({"has_mask": True}, "a mask or a soft cap"),
        ({"has_softcap": True}, "a mask or a soft cap"),
        ({"has_window": True}, "a window"),
    ],
)
def test_what_it_refuses_runs_by_the_other_form(changes: dict[str, Any], reason: str) -> None:
    spec = dataclasses.replace(SPEC, **changes)
    assert reason in (ATTENTION_HOPPER.refuses(spec, H200) or "")
    form, tile = ATTENTION.heuristic(spec, 1024, H200)
    assert form.name == "attention_prefill" and tile["BLOCK_R"] >= 16


def test_it_is_chosen_on_hopper() -> None:
    for spec in (SPEC, dataclasses.replace(SPEC, has_chunk=True)):
        assert ATTENTION.heuristic(spec, 1024, H200)[0] is ATTENTION_HOPPER
        assert ATTENTION.heuristic(spec, 1024, A100)[0].name == "attention_prefill"
        assert ATTENTION_HOPPER not in ATTENTION.usable(spec, A100)
        assert faster_than_flash(spec, H200) and not faster_than_flash(spec, A100)
    assert "not of compute capability 9.0" in (ATTENTION_HOPPER.refuses(SPEC, A100) or "")


def test_tiles_fit_an_sm() -> None:
    for tile in ATTENTION_HOPPER.candidates(SPEC, 1024, H200):
        assert ATTENTION_HOPPER.shared_bytes is not None
        assert ATTENTION_HOPPER.shared_bytes(SPEC, tile) <= H200.shared_bytes
        # of 65,536 registers four warps get 168 per thread three times, though one warp of the last
        # four works, and share those out in eights
        own = 3 * 168 - tile["REGISTERS"] - 24
        assert own >= tile["REGISTERS"]
        assert all(n % 8 == 0 for n in (own, tile["REGISTERS"]))


class Defined:
    """Stands in for the kernel: does what it does with the arguments it gets."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.tile: Tile = ATTENTION_HOPPER.heuristic(spec, 1, H200)
        self.grids: list[tuple[int, ...]] = []

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        q, _, _, _, boxes, length, _, out, sinks, scale, seq, capacity, heads, rows, *rest = args
        assert isinstance(boxes, TensorDescriptor)
        assert boxes.block_shape == [self.tile["TOKENS"], q.shape[3]]
        k, v = boxes.base.float()
        assert k.shape == (q.shape[0], heads, rows, q.shape[3])
        pairs = q.shape[0] * heads
        assert rest == [pairs, pairs * -(-seq * (q.shape[1] // heads) // 128)]
        assert 0 < grid[0] <= rest[1]
        self.grids.append(grid)
        for b, count in enumerate(length.tolist()):
            assert count <= capacity
            places = count - seq + torch.arange(seq, device=q.device)
            seen = torch.arange(count, device=q.device) <= places[:, None]
            of = (q[b : b + 1].float(), k[b : b + 1, :, :count], v[b : b + 1, :, :count])
            given = sinks.float() if self.spec.has_sinks else None
            out[b] = kv_reference.attention(*of, seen[None, None], given, scale, 0.0, False)[0]


@pytest.mark.parametrize(
    ("sequences", "heads", "launches"), [(3, 2, 1), (2, 2, 2), (1, 2, 3), (0, 1, 6), (0, 0, 6)]
)
@pytest.mark.parametrize("flag", ["has_chunk", "has_sinks"])
def test_scratch_is_bounded_by_parts(
    sequences: int, heads: int, launches: int, flag: str, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spec = dataclasses.replace(SPEC, **{flag: True})
    call = trial_call(spec, 3, 60, 140, device)
    call.length.copy_(torch.tensor([200, 70, 129]))
    kernel: Any = Defined(spec)
    # 256 tokens of a head, keys and values in fp16
    room = (sequences * 2 or heads) * 2 * 256 * 128 * 2
    monkeypatch.setattr(attention_hopper, "SCRATCH", room)
    got = launch(unpacking(spec, device), kernel, call)
    assert len(kernel.grids) == launches
    close(spec, call, got)


def unpacking(spec: AttentionSpec, device: torch.device) -> Kernel:
    return build(ATTENTION_UNPACK, spec, ATTENTION_UNPACK.heuristic(spec, 1, device_key(device)))


def cut(call: Call, lengths: list[int]) -> Call:
    """The call with sequences of `lengths`, and NaN in what lies behind their ends."""
    for row, length in enumerate(lengths):
        for i, page in enumerate(call.block_table[row].tolist()):
            call.kv_words[page, :, :, max(0, min(PAGE, length - PAGE * i)) :] = 0x7E007E00
    call.length.copy_(torch.tensor(lengths))
    return call


def run(spec: AttentionSpec, call: Call) -> torch.Tensor:
    device = call.q.device
    if device_key(device).arch != 90:
        pytest.skip("needs a GPU of compute capability 9.0")
    assert ATTENTION.usable(spec, device_key(device))[0] is ATTENTION_HOPPER
    tile = ATTENTION_HOPPER.heuristic(spec, call.q.shape[2], device_key(device))
    return launch(unpacking(spec, device), build(ATTENTION_HOPPER, spec, tile), call)


def check(spec: AttentionSpec, call: Call) -> None:
    close(spec, call, run(spec, call))


def close(spec: AttentionSpec, call: Call, out: torch.Tensor) -> None:
    """The error of the whole output: its rounding to 16 bit, and fp16 operands."""
    wide = [None if x is None else x.float() for x in (call.k_chunk, call.v_chunk)]
    pages = (call.k_pages, call.v_pages, call.kv_words, call.block_table, call.length)
    want = kv_reference.kv_attention(
        call.q.float(), *pages, None, *wide, call.scale, 4, spec.causal, 0.0, call.sinks
    ).double()
    got = out.double()
    assert (got - want).norm() <= {BF16: 2e-3, FP16: 8e-4}[spec.dtype] * want.norm()
    bound = 8 * {BF16: 2e-3, FP16: 8e-4}[spec.dtype] * want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (16, 1, 64), (14, 2, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("chunk", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_against_the_definition(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, chunk: bool, causal: bool,
    device: torch.device,
) -> None:  # fmt: skip
    spec = AttentionSpec(
        heads, KVSpec(kv_heads, dim, dim), dtype, has_chunk=chunk, causal=causal
    )  # fmt: skip
    for lengths, seq in (([133, 64], 33), ([570, 70, 321], 70), ([701, 65], 1), ([1300], 300)):
        check(spec, cut(trial_call(spec, len(lengths), seq, max(lengths) - seq, device), lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [False, True])
def test_sinks(chunk: bool, device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, has_chunk=chunk, has_sinks=True)
    check(spec, trial_call(spec, 2, 70, 200, device))


@pytest.mark.gpu
@pytest.mark.parametrize("room", [0, 2])
def test_parts_are_the_whole(
    room: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(SPEC, has_chunk=True, has_sinks=True)
    call = cut(trial_call(spec, 3, 70, 200, device), [270, 130, 71])
    whole = run(spec, call)
    monkeypatch.setattr(attention_hopper, "SCRATCH", room * 2 * 384 * 128 * 2)
    assert torch.equal(run(spec, call), whole)


@pytest.mark.gpu
def test_a_graph_may_be_replayed_with_other_lengths(device: torch.device) -> None:
    call = trial_call(SPEC, 2, 70, 400, device)
    run(SPEC, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(SPEC, call)
    call.length.copy_(torch.tensor([300, 129]))
    graph.replay()
    close(SPEC, call, out)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4, 1e6])
def test_queries_of_any_size(size: float, device: torch.device) -> None:
    """1e6 is no fp16. With a scale that keeps the scores the same."""
    call = trial_call(SPEC, 1, 70, 200, device)
    call.q.mul_(size)
    check(SPEC, dataclasses.replace(call, scale=call.scale / size))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_any_scale(scale: float, device: torch.device) -> None:
    check(SPEC, dataclasses.replace(trial_call(SPEC, 1, 70, 200, device), scale=scale))


@pytest.mark.gpu
def test_sequences_without_tokens_give_zeros_and_too_long_ones_nan(device: torch.device) -> None:
    call = trial_call(SPEC, 3, 40, 100, device)
    call.length.copy_(torch.tensor([140, 0, 3 * PAGE + 1]))
    out = run(SPEC, call)
    assert not out[0].isnan().any() and out[0].abs().min() > 0
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[2].isnan().all()


@pytest.mark.gpu
def test_the_same_batch_gives_the_same_bits(device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, has_chunk=True)
    call = trial_call(spec, 4, 500, 3000, device)
    assert torch.equal(run(spec, call), run(spec, call))
