"""Pages are counted in the bytes they take, and as many are made as fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qoqc.errors import Unsupported
from qoqc.ir.spec import KVSpec
from qoqc.serve import accounting
from qoqc.serve.accounting import Limits, resolve
from qoqc.serve.pages import Pages
from qoqc.shapes import shape

CPU = torch.device("cpu")
SPECS = [KVSpec(8, 128, 128, 4)] * 32


def llama() -> Any:
    return SimpleNamespace(**shape("llama-3-8b"))


def test_bytes_are_those_of_the_allocated_tensors() -> None:
    specs = [KVSpec(2, 64, 64, 4), KVSpec(2, 64, 64, 8), KVSpec(1, 96, 32, 4)]
    pages = Pages(specs, 7, CPU)
    assert accounting.block_bytes(specs) * 8 == pages.nbytes


def test_a_gibibyte_holds_almost_four_times_the_tokens_of_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = 24 * 2**30
    monkeypatch.setattr(accounting, "free_bytes", lambda device: free)
    sizes = resolve(Limits(memory_fraction=0.5), llama(), SPECS, CPU, torch.bfloat16)
    spent = accounting.activation_bytes(llama(), sizes.max_tokens_per_batch, 256, torch.bfloat16)
    room = free // 2 - spent
    in_bf16 = room // accounting.sixteen_bit_bytes(SPECS)
    assert room - accounting.block_bytes(SPECS) < sizes.num_pages * accounting.block_bytes(SPECS)
    assert sizes.num_pages * accounting.block_bytes(SPECS) <= room
    assert 3.7 < sizes.num_pages / in_bf16 < 3.8


def test_no_more_pages_than_requests_can_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "free_bytes", lambda device: 2**40)
    sizes = resolve(Limits(max_requests=4), llama(), SPECS, CPU, torch.bfloat16)
    assert sizes.num_pages == 4 * 8192 // 64
    assert (sizes.request_tokens, sizes.pages_per_request) == (8192, 128)
    short = Limits(max_requests=4, request_tokens=100)
    sizes = resolve(short, llama(), SPECS, CPU, torch.bfloat16)
    assert (sizes.num_pages, sizes.request_tokens, sizes.pages_per_request) == (8, 100, 2)


def test_a_request_is_no_longer_than_the_pages_there_are() -> None:
    sizes = resolve(Limits(num_pages=3), llama(), SPECS, CPU, torch.bfloat16)
    assert (sizes.num_pages, sizes.request_tokens) == (3, 192)


def test_sizes_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (Limits(num_pages=0), Limits(memory_fraction=1.5), Limits(max_requests=-1)):
        with pytest.raises(ValueError, match="expected"):
            resolve(wrong, llama(), SPECS, CPU, torch.bfloat16)
    monkeypatch.setattr(accounting, "free_bytes", lambda device: 2**20)
    with pytest.raises(Unsupported, match="lower max_tokens_per_batch"):
        resolve(Limits(), llama(), SPECS, CPU, torch.bfloat16)


def test_free_memory_is_some(device: torch.device) -> None:
    assert 2**20 < accounting.free_bytes(device) < 2**50
