"""Tiles of kernels that go over whole tokens: tokens in registers, or a loop over one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from qoqc.codegen.family import Tile
from qoqc.codegen.kernels.pieces import INTERPRETED_DEVICE, depends_on
from qoqc.runtime.device import DeviceKey

LOOP_BLOCK = 4096
"""Values of a token that does not fit into registers which a program takes at a time."""

PAIRED = 4096
"""Values of a token, at most, that may share a program with another: sixteen warps hold both."""


def come_in_pairs(padded: int, size: int, device: DeviceKey) -> bool:
    """Should `size` tokens of `padded` values be taken two at a time? On sm_90, near its SM count.

    The linears of a Llama-3-8B layer with their norms and quantizations take 86.8 us with 128
    tokens one by one on an H200, and 83.7 in pairs; with 256, 128.7 and 125.7. With 64 tokens it
    makes no difference, with 16 pairs lose 2.5: there every SM is free for one, and each takes
    longer.
    """
    near = device.sm_count <= 2 * size and size <= 2 * device.sm_count
    return device.arch == 90 and near and padded <= PAIRED


def tile_of(
    features: int,
    dtype: torch.dtype,
    values: int,
    num_warps: int,
    device: DeviceKey,
    one_pass: int,
) -> Tile:
    """A tile of about `values` values: whole tokens up to `one_pass` long, else a piece of one."""
    padded = max(16, triton.next_power_of_2(features))
    loop = padded > one_pass
    block = min(padded, LOOP_BLOCK) if loop else padded
    constexprs = {
        "ROWS": 1 if loop else max(1, values // block),
        "BLOCK_K": block,
        "LOOP": int(loop),
        # the interpreter cuts where hardware rounds
        "ROUND_BF16": int(device.name == INTERPRETED_DEVICE and dtype is torch.bfloat16),
    }
    return Tile((*constexprs.items(), depends_on(device)), num_warps, num_stages=2)


def heuristic(
    features: int, dtype: torch.dtype, size: int, device: DeviceKey, one_pass: int
) -> Tile:
    """Sixteen values per thread, two 16-byte loads; tokens together only where they are many."""
    padded = max(16, triton.next_power_of_2(features))
    held = LOOP_BLOCK if padded > one_pass else padded
    if come_in_pairs(padded, size, device):
        held = 2 * padded
    values = max(held, 2048 if size >= 4 * device.sm_count else 0)
    num_warps = min(16, max(1, values // 512))
    return tile_of(features, dtype, values, num_warps, device, one_pass)


def candidates(
    features: int, dtype: torch.dtype, size: int, device: DeviceKey, one_pass: int
) -> Sequence[Tile]:
    """Tokens per program times warps; at most 64 values per thread, more would spill."""
    tiles = {heuristic(features, dtype, size, device, one_pass): None}
    for values in (1, 2048, 4096, 8192):
        for num_warps in (1, 2, 4, 8, 16):
            tile = tile_of(features, dtype, values, num_warps, device, one_pass)
            if tile["ROWS"] * tile["BLOCK_K"] <= 64 * 32 * num_warps:
                tiles[tile] = None
    return tuple(tiles)
