"""The tiles of 4-bit weights: inverse of each other, byte positions, padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoqc.quant.pack import ceil_div, pack_nibbles, unpack_nibbles

SETTINGS = settings(deadline=None, max_examples=40)
SIZES = st.one_of(st.integers(0, 300), st.sampled_from([127, 128, 129, 255, 256, 257]))


def codes(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)


@given(n=SIZES, k=SIZES, seed=st.integers(0, 2**16))
@SETTINGS
def test_unpack_inverts_pack(n: int, k: int, seed: int) -> None:
    q4 = codes(n, k, seed)
    packed = pack_nibbles(q4)
    assert packed.shape == (ceil_div(n, 128), ceil_div(k, 128), 128, 64)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(packed, n, k), q4)


@given(n_tiles=st.integers(0, 3), k_tiles=st.integers(0, 3), seed=st.integers(0, 2**16))
@SETTINGS
def test_pack_inverts_unpack_of_any_bytes(n_tiles: int, k_tiles: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_tiles, k_tiles, 128, 64)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    assert torch.equal(pack_nibbles(unpack_nibbles(tiles, n_tiles * 128, k_tiles * 128)), tiles)


@pytest.mark.parametrize(
    ("row", "column", "where", "value"),
    [
        (0, 0, (0, 0, 0, 0), 0x0B),
        (0, 63, (0, 0, 0, 63), 0x0B),
        (0, 64, (0, 0, 0, 0), 0xB0),
        (0, 127, (0, 0, 0, 63), 0xB0),
        (127, 128, (0, 1, 127, 0), 0x0B),
        (128, 200, (1, 1, 0, 8), 0xB0),
        (299, 256, (2, 2, 43, 0), 0x0B),
    ],
)
def test_byte_of_a_weight(
    row: int, column: int, where: tuple[int, int, int, int], value: int
) -> None:
    q4 = torch.zeros(300, 257, dtype=torch.uint8)
    q4[row, column] = 0xB
    packed = pack_nibbles(q4)
    assert packed[where] == value
    packed[where] = 0
    assert not packed.any()


def test_a_tile_is_contiguous() -> None:
    packed = pack_nibbles(codes(256, 384))
    assert packed.is_contiguous()
    assert packed[1, 2].numel() == 8192


def test_fill_goes_to_the_channels_past_k_only() -> None:
    q4, fill = codes(130, 100), torch.arange(130, dtype=torch.uint8) % 16
    full = unpack_nibbles(pack_nibbles(q4, fill), 256, 128)
    assert torch.equal(full[:130, :100], q4)
    assert torch.equal(full[:130, 100:], fill[:, None].expand(130, 28))
    assert not full[130:].any()


def test_no_fill_pads_with_zeros() -> None:
    full = unpack_nibbles(pack_nibbles(codes(3, 5)), 128, 128)
    assert not full[3:].any()
    assert not full[:, 5:].any()


def test_fill_changes_nothing_when_k_is_whole() -> None:
    q4 = codes(5, 256)
    assert torch.equal(pack_nibbles(q4, torch.full((5,), 9, dtype=torch.uint8)), pack_nibbles(q4))


def test_a_non_contiguous_input_packs_alike() -> None:
    q4 = codes(200, 130)
    assert torch.equal(pack_nibbles(q4.t().contiguous().t()), pack_nibbles(q4))


@pytest.mark.parametrize(
    ("a", "b", "want"), [(0, 128, 0), (1, 128, 1), (128, 128, 1), (129, 128, 2)]
)
def test_ceil_div(a: int, b: int, want: int) -> None:
    assert ceil_div(a, b) == want
