"""Grids: the same values, codes and packing as quant/weight.py, for every column and padding."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqc.calibrate.ranges import groups_of, plain_grid
from qoqc.quant.pack import unpack_nibbles
from qoqc.quant.weight import dequantize_weight, quantize_weight

SETTINGS = settings(deadline=None, max_examples=20)
Format = Literal[128, -1]
FORMATS: tuple[Format, ...] = (128, -1)
both_formats = pytest.mark.parametrize("group_size", FORMATS)


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def codes(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)


@given(
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    group_size=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**16),
)
@SETTINGS
def test_packed_codes_come_back_with_the_grids_own_values(
    n: int, k: int, group_size: Format, seed: int
) -> None:
    grid = plain_grid(weight(n, k, seed), group_size)
    chosen = codes(n, k, seed)
    packed = grid.pack(chosen)
    assert packed.group_size == group_size
    assert torch.equal(unpack_nibbles(packed.qweight, n, k), chosen)
    assert torch.equal(dequantize_weight(packed), grid.values(chosen))


@given(n=st.integers(1, 140), k=st.integers(1, 300), seed=st.integers(0, 2**16))
@SETTINGS
def test_the_plain_grid_is_that_of_quantize_weight(n: int, k: int, seed: int) -> None:
    w = weight(n, k, seed)
    for group_size in FORMATS:
        expected = quantize_weight(w, group_size)
        found = plain_grid(w, group_size).pack(codes(n, k))
        assert torch.equal(found.channel_scale, expected.channel_scale)
        for a, b in (
            (found.group_word, expected.group_word),
            (found.channel_zero, expected.channel_zero),
        ):
            assert (a is None and b is None) or (
                a is not None and b is not None and torch.equal(a, b) and a.dtype == b.dtype
            )


@both_formats
@pytest.mark.parametrize("k", [1, 100, 129, 256])
def test_padding_is_that_of_quantize_weight(group_size: Format, k: int) -> None:
    w = weight(130, k) + 1
    grid = plain_grid(w, group_size)
    wide = -(-k // 128) * 128
    ours = unpack_nibbles(grid.pack(codes(130, k)).qweight, 256, wide)
    theirs = unpack_nibbles(quantize_weight(w, group_size).qweight, 256, wide)
    assert torch.equal(ours[:, k:], theirs[:, k:])
    assert torch.equal(ours[130:], theirs[130:])


@both_formats
def test_one_column_is_a_column_of_the_whole(group_size: Format) -> None:
    w = weight(9, 300)
    grid = plain_grid(w, group_size)
    nearest = grid.nearest(w)
    values = grid.values(nearest)
    for k in (0, 127, 128, 299):
        column = grid.column(k)
        chosen = column.codes(w[:, k])
        assert torch.equal(chosen.to(torch.uint8), nearest[:, k])
        assert torch.equal(column.values(chosen), values[:, k])


@both_formats
def test_nearest_beats_every_other_code(group_size: Format) -> None:
    w = weight(6, 200)
    grid = plain_grid(w, group_size)
    error = (grid.values(grid.nearest(w)) - w).abs()
    for code in range(16):
        other = (grid.values(torch.full((6, 200), code, dtype=torch.uint8)) - w).abs()
        assert bool((error <= other * (1 + 1e-6)).all())


@both_formats
@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, 128), (3, 0)])
def test_empty_shapes(group_size: Format, n: int, k: int) -> None:
    grid = plain_grid(weight(n, k), group_size)
    packed = grid.pack(grid.nearest(weight(n, k)))
    expected = quantize_weight(weight(n, k), group_size)
    for name, tensor in expected.tensors().items():
        assert torch.equal(packed.tensors()[name], tensor), name


@both_formats
def test_a_channel_of_zeros_stays_zero(group_size: Format) -> None:
    w = weight(4, 256)
    w[2] = 0
    grid = plain_grid(w, group_size)
    assert not grid.values(grid.nearest(w))[2].any()


@pytest.mark.parametrize("k", [1, 128, 200])
def test_groups_are_contiguous_and_padded_with_zeros(k: int) -> None:
    w = weight(3, k)
    grouped = groups_of(w)
    assert grouped.shape == (3, -(-k // 128), 128)
    assert torch.equal(grouped.reshape(3, -1)[:, :k], w)
    assert not grouped.reshape(3, -1)[:, k:].any()
