"""The order in which QServe stores 4-bit weights and their level-2 scales (its w4a8_linear.py).

Weights [N, K] are cut into tiles of 32 by 32, tile by tile along K, 512 bytes each: 32 lanes of
16 bytes, what a lane feeds to four m16n8k32 instructions. In byte b of lane l the low nibble is

    n = l // 4 + 8 * (b // 4 % 2),    k = 4 * (l % 4) + b % 4 + 16 * (b // 8)

and the high one the same k of channel n + 16. Scales [K/128, N] keep each run of 32 channels in
the order 0, 8, 16, 24, 1, 9, ...
"""

from __future__ import annotations

import torch

TILE = 32
"""Both sizes of a weight must be multiples of it."""


def unpack(qweight: torch.Tensor) -> torch.Tensor:
    """int8 [N, K/2] in QServe's order as codes uint8 [N, K], 0..15."""
    n, k = qweight.shape[0], qweight.shape[1] * 2
    # n, k tile, then in a tile: n % 8, k // 4 % 4, k // 16, n // 8 % 2, k % 4
    stored = qweight.view(torch.uint8).reshape(n // TILE, k // TILE, 8, 4, 2, 2, 4)
    codes = torch.stack((stored & 15, stored >> 4), dim=2)  # n // 16 in front of them
    return codes.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(n, k)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack`."""
    n, k = codes.shape
    split = codes.reshape(n // TILE, 2, 2, 8, k // TILE, 2, 4, 4)
    stored = split.permute(0, 4, 1, 3, 6, 5, 2, 7)
    packed = stored[:, :, 0] | (stored[:, :, 1] << 4)
    return packed.reshape(n, k // 2).view(torch.int8)


def unshuffle(values: torch.Tensor) -> torch.Tensor:
    """[G, N] in QServe's order of channels, in natural order."""
    groups, n = values.shape
    return values.reshape(groups, n // TILE, 8, 4).transpose(-1, -2).reshape(groups, n)


def shuffle(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `unshuffle`."""
    groups, n = values.shape
    return values.reshape(groups, n // TILE, 4, 8).transpose(-1, -2).reshape(groups, n)
