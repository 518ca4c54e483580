"""The stored form of 4-bit weights: nibbles in tiles of 128 output by 128 input channels.

Byte `[n // 128, k // 128, n % 128, j]` holds input channel `j` of its tile in the low nibble and
`j + 64` in the high one, so that one 8 KiB tile is contiguous and both nibbles of a byte share a
level-2 group. Both sizes are padded up to whole tiles; `unpack` is the inverse of `pack`.
"""

from __future__ import annotations

import torch

from qoqc.ir.spec import GROUP, TILE_N

HALF = GROUP // 2


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up."""
    return -(-a // b)


def pack_nibbles(q4: torch.Tensor, fill: torch.Tensor | None = None) -> torch.Tensor:
    """Pack `q4` uint8 [N, K] (values 0..15) into tiles uint8 [N/128, K/128, 128, 64], rounded up.

    Padding along K takes `fill` uint8 [N] (the code of an exact zero in the last group), along N 0.
    """
    n, k = q4.shape
    n_tiles, k_tiles = ceil_div(n, TILE_N), ceil_div(k, GROUP)
    full = q4.new_zeros(n_tiles * TILE_N, k_tiles * GROUP)
    if fill is not None:
        full[:n, k:] = fill[:, None]
    full[:n, :k] = q4
    tiles = full.view(n_tiles, TILE_N, k_tiles, 2, HALF)
    packed = tiles[:, :, :, 0] | (tiles[:, :, :, 1] << 4)
    return packed.permute(0, 2, 1, 3).contiguous()


def unpack_nibbles(qweight: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [out_features, in_features], values 0..15."""
    n_tiles, k_tiles = qweight.shape[:2]
    tiles = qweight.permute(0, 2, 1, 3)
    full = torch.stack((tiles & 15, tiles >> 4), dim=3)
    return full.reshape(n_tiles * TILE_N, k_tiles * GROUP)[:out_features, :in_features]
