"""Runs of row numbers spell out any order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qoqc.passes.structure.facts import LinearRef, index_of, runs_of


@given(st.lists(st.integers(0, 40), min_size=1))
def test_runs_spell_the_index(index: list[int]) -> None:
    runs = runs_of(index)
    assert index_of(runs).tolist() == index
    assert all(one[1] != other[0] for one, other in zip(runs, runs[1:], strict=False))


def test_whole() -> None:
    ref = LinearRef("w", None, 8, 6, ((0, 6),))
    assert ref.is_whole
    assert ref.out_features == 6
    part = LinearRef("w", None, 8, 6, ((4, 6), (0, 2)))
    assert not part.is_whole
    assert part.out_features == 4
    assert torch.equal(part.index(), torch.tensor([4, 5, 0, 1]))
