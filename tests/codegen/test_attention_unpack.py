"""Pages and exact tokens as fp16 rows, against the definition of reading a cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qoqc.codegen.build import build
from qoqc.codegen.kernels import attention_unpack
from qoqc.codegen.kernels.attention import Call, trial_call
from qoqc.codegen.kernels.attention_unpack import ATTENTION_UNPACK, TOKENS
from qoqc.ir.kv_reference import kv_dequant
from qoqc.ir.spec import PAGE, AttentionSpec, KVSpec
from qoqc.runtime.device import device_key

BF16, FP16 = torch.bfloat16, torch.float16
SPEC = AttentionSpec(8, KVSpec(2, 128, 128), BF16, causal=True)


def unpacked(spec: AttentionSpec, call: Call, heads: int) -> torch.Tensor:
    tile = ATTENTION_UNPACK.heuristic(spec, call.q.shape[2], device_key(call.q.device))
    return attention_unpack.launch(build(ATTENTION_UNPACK, spec, tile), call, heads)


def defined(call: Call) -> torch.Tensor:
    """What the definition gives, numbers that fp16 has not as its largest ones."""
    pages = (call.k_pages, call.v_pages, call.kv_words, call.block_table, call.length)
    wide = torch.stack(kv_dequant(*pages, call.k_chunk, call.v_chunk, 4, torch.float32))
    return wide.clamp(-65504, 65504).half()


def check(call: Call, got: torch.Tensor) -> None:
    """All tokens, and zeros behind the last one where its tile goes on."""
    want = defined(call)
    for b, length in enumerate(call.length.tolist()):
        end = -(-length // TOKENS) * TOKENS
        assert got.shape[3] >= end
        held = want[:, b, :, :end]
        # fused or not, a product and a sum: one step of fp16 apart at most
        torch.testing.assert_close(got[:, b, :, : held.shape[2]], held, rtol=1e-3, atol=1e-6)
        assert not got[:, b, :, held.shape[2] : end].any()


def cut(call: Call, lengths: list[int]) -> Call:
    """The call with sequences of `lengths`, and NaN in what lies behind their ends."""
    for row, length in enumerate(lengths):
        for i, page in enumerate(call.block_table[row].tolist()):
            call.kv_words[page, :, :, max(0, min(PAGE, length - PAGE * i)) :] = 0x7E007E00
    call.length.copy_(torch.tensor(lengths))
    return call


@pytest.mark.parametrize(("dim", "dtype"), [(128, BF16), (64, FP16)])
@pytest.mark.parametrize("chunk", [False, True])
def test_against_the_definition(
    dim: int, dtype: torch.dtype, chunk: bool, device: torch.device
) -> None:
    spec = AttentionSpec(4, KVSpec(2, dim, dim), dtype, has_chunk=chunk, causal=True)
    for lengths, seq in (([133, 64, 65], 33), ([200, 70], 70), ([128], 1)):
        call = cut(trial_call(spec, len(lengths), seq, max(lengths) - seq, device), lengths)
        check(call, unpacked(spec, call, 2))


def test_chunks_of_any_strides_and_size(device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, has_chunk=True)
    call = trial_call(spec, 1, 40, 30, device)
    assert call.k_chunk is not None and call.v_chunk is not None
    k_chunk = (call.k_chunk * 1e5).transpose(1, 2).contiguous().transpose(1, 2)
    v_chunk = call.v_chunk.transpose(2, 3).contiguous().transpose(2, 3)
    call = dataclasses.replace(call, k_chunk=k_chunk, v_chunk=v_chunk)
    got = unpacked(spec, call, 2)
    assert got[0].max() == 65504
    check(call, got)


def test_a_chunk_longer_than_its_sequence_gives_its_end(device: torch.device) -> None:
    spec = dataclasses.replace(SPEC, has_chunk=True)
    call = trial_call(spec, 1, 100, 28, device)
    call.length.fill_(30)
    assert call.k_chunk is not None
    got = unpacked(spec, call, 2)
    assert torch.equal(got[0, 0, :, :30], call.k_chunk[0, :, 70:].half())
    assert not got[:, :, :, 30:].any()


def test_some_heads_alone(device: torch.device) -> None:
    call = trial_call(SPEC, 2, 10, 80, device)
    whole = unpacked(SPEC, call, 2)
    assert torch.equal(unpacked(SPEC, call, 1)[:, :, :, :90], whole[:, :, :1, :90])
    last = dataclasses.replace(
        call, k_pages=call.k_pages[:, 1:], v_pages=call.v_pages[:, 1:],
        kv_words=call.kv_words[:, 1:],
    )  # fmt: skip
    assert torch.equal(unpacked(SPEC, last, 1)[:, :, :, :90], whole[:, :, 1:, :90])


def test_of_a_sequence_that_its_table_cannot_hold_nothing_is_read(device: torch.device) -> None:
    call = trial_call(SPEC, 1, 10, 54, device)
    call.length.fill_(PAGE + 1)
    call.block_table.fill_(1 << 20)
    unpacked(SPEC, call, 2)
    if device.type == "cuda":
        torch.cuda.synchronize()
