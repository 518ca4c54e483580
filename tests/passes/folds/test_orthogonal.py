"""Orthogonal matrices are orthogonal, spread outliers, and fix the ones where asked to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoqc.passes.folds.orthogonal import fixing_ones, hadamard, orthogonal

ROUNDING = 1e-12
"""fp64 products of up to 200 terms."""


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(0, 9)))
def test_orthogonal(size: int, seed: int | None) -> None:
    q = orthogonal(size, seed)
    assert float((q @ q.t() - torch.eye(size, dtype=torch.float64)).abs().max()) < ROUNDING


@given(st.integers(2, 200), st.integers(0, 9))
def test_fixing_ones(size: int, seed: int) -> None:
    q = fixing_ones(orthogonal(size, seed))
    ones = torch.ones(size, dtype=torch.float64)
    assert float((q @ q.t() - torch.eye(size, dtype=torch.float64)).abs().max()) < ROUNDING
    assert float((q @ ones - ones).abs().max()) < ROUNDING


@pytest.mark.parametrize("size", [2, 16, 128])
def test_hadamard_spreads_evenly(size: int) -> None:
    for q in (hadamard(size), orthogonal(size, seed=1)):
        torch.testing.assert_close(q.abs(), torch.full_like(q, size**-0.5))


def test_signs_keep_a_mean_from_gathering() -> None:
    ones = torch.ones(128, dtype=torch.float64)
    assert float((orthogonal(128, None) @ ones).abs().max()) > 11
    assert float((orthogonal(128, 0) @ ones).abs().max()) < 5


@pytest.mark.parametrize("size", [0, 3, 96])
def test_no_hadamard(size: int) -> None:
    with pytest.raises(ValueError, match=f"size {size}: not a power of two"):
        hadamard(size)
