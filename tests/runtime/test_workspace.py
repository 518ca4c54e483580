"""Counters of launches that are captured: their own, zero, and aligned for Triton."""

from __future__ import annotations

import pytest
import torch

from qoqc.runtime import workspace

CPU = torch.device("cpu")


@pytest.fixture
def reserve(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A small reserve, in the place of a GPU's."""
    found = torch.zeros(24, dtype=torch.int32)
    monkeypatch.setattr(workspace, "_RESERVES", {CPU: (found, 0)})
    return found


def test_captured_launches_share_nothing_and_all_are_aligned(reserve: torch.Tensor) -> None:
    counts = (1, 3, 4, 5)
    slices = [workspace._captured(CPU, count) for count in counts]
    for number, (counters, count) in enumerate(zip(slices, counts, strict=True), 1):
        assert counters.numel() >= count
        assert counters.data_ptr() % 16 == 0
        assert counters.untyped_storage().data_ptr() == reserve.data_ptr()
        assert not counters.any(), "another launch's"
        counters.fill_(number)


def test_behind_the_reserve_they_are_made_anew(reserve: torch.Tensor) -> None:
    workspace._captured(CPU, 21)
    reserve.fill_(1)
    counters = workspace._captured(CPU, 1)
    assert counters.numel() >= 1
    assert not counters.any()


@pytest.mark.gpu
def test_a_capture_gives_aligned_counters() -> None:
    device = torch.device("cuda")
    workspace.zeroed_counters(device, 1)  # makes the reserve, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slices = [workspace.zeroed_counters(device, count) for count in (3, 1, 6, 2)]
    assert len({counters.untyped_storage().data_ptr() for counters in slices}) == 1, "the reserve"
    addresses = [counters.data_ptr() for counters in slices]
    assert len(set(addresses)) == 4
    assert all(address % 16 == 0 for address in addresses)
