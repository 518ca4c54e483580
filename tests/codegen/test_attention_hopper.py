"""The sm_90 form of attention over pages: on a GPU against the definition; its choice anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qoqc.codegen.aot import Recorder
from qoqc.codegen.build import build
from qoqc.codegen.kernels.attention import Call, trial_call
from qoqc.codegen.kernels.attention_forms import ATTENTION, faster_than_flash
from qoqc.codegen.kernels.attention_hopper import ATTENTION_HOPPER, start
from qoqc.codegen.kernels.attention_prefill import launch
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
        # of 65,536 registers three warpgroups get 168 per thread, and share those out in eights
        own = 3 * 168 - tile["REGISTERS"] - tile["UNPACK_REGISTERS"]
        assert own >= tile["REGISTERS"]
        assert all(n % 8 == 0 for n in (own, tile["REGISTERS"], tile["UNPACK_REGISTERS"]))


@pytest.mark.parametrize("layout", ["tokens", "heads", "odd"])
def test_chunks_go_in_as_pairs_of_numbers(layout: str) -> None:
    spec = dataclasses.replace(SPEC, has_chunk=True)
    call = trial_call(spec, 1, 5, 70, CPU)
    assert call.k_chunk is not None
    if layout == "tokens":
        k_chunk = call.k_chunk.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "odd":  # rows of 129 numbers: no pairs start at every second one
        k_chunk = torch.zeros(1, 2, 5, 129, dtype=BF16)[..., :128].copy_(call.k_chunk)
    else:
        k_chunk = call.k_chunk
    recorder = Recorder(ATTENTION_HOPPER.heuristic(spec, 5, H200))
    call = dataclasses.replace(call, k_chunk=k_chunk)
    start(recorder, call, call.empty_out())
    assert recorder.grid == (1, 2, 1)
    pairs, *strides = recorder.arguments[11:15]
    assert pairs.dtype is torch.int32
    assert torch.equal(pairs.view(BF16), k_chunk)
    assert tuple(strides) == pairs.stride()[:3]


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
    assert ATTENTION_HOPPER.refuses(spec, device_key(device)) is None
    tile = ATTENTION_HOPPER.heuristic(spec, call.q.shape[2], device_key(device))
    return launch(build(ATTENTION_HOPPER, spec, tile), call)


def check(spec: AttentionSpec, call: Call) -> None:
    """The error of the whole output: its rounding to 16 bit, and fp16 operands."""
    wide = [None if x is None else x.float() for x in (call.k_chunk, call.v_chunk)]
    pages = (call.k_pages, call.v_pages, call.kv_words, call.block_table, call.length)
    want = kv_reference.kv_attention(
        call.q.float(), *pages, None, *wide, call.scale, 4, spec.causal, 0.0, call.sinks
    ).double()
    got = run(spec, call).double()
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
