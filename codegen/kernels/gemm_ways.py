"""The W4A8 GEMM (kernels/gemm.py says what it computes) for a few tokens, plain Triton, any GPU.

With few tokens a block is a chain of waiting, unpacking and multiplying. Here the warps of a block
share its channels and each takes every WAYS-th k tile, so that WAYS chains run at a time: a split
of K inside the block. The int32 sums meet in shared memory at the end; integer sums do not depend
on the order, so neither does y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Family, Launch, Tile
from qoqc.codegen.kernels.gemm import GemmCall
from qoqc.codegen.kernels.gemm_epilogue import finish
from qoqc.codegen.kernels.gemm_selfcheck import selfcheck
from qoqc.codegen.kernels.gemm_trial import trial_with
from qoqc.codegen.kernels.pieces import (
    INTERPRETED_DEVICE,
    dequantize_group,
    dequantize_group_ptx,
    unpack_int4,
    unpack_int4_ptx,
)
from qoqc.codegen.roofline import Work, gemm_work
from qoqc.ir.spec import GROUP, TILE_N, LinearSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey

ROWS = tl.constexpr(TILE_N)  # output channels of a packed tile
HALF = tl.constexpr(GROUP // 2)  # bytes per channel of a packed tile
TILE_BYTES = tl.constexpr(TILE_N * GROUP // 2)

MAX_BLOCK_M = 32
"""Tokens of a block at most: every way holds the sums of the whole block."""

MAX_SUMS = 2048
"""Sums of a block at most, 64 registers of a thread: twice as many spill (255 registers)."""


@triton.jit(do_not_specialize=["M"])
def gemm_ways_kernel(
    xq_ptr,  # [M, K] int8
    token_scale_ptr,  # [M] fp32
    token_sum_ptr,  # [M] int32, read per channel only
    w_ptr,  # [N/128, K/128, 128, 64] uint8, both rounded up
    channel_scale_ptr,  # [N] fp32
    word_ptr,  # [K/128, N] int32 group words, or [N] int32 channel zeros
    bias_ptr,  # [N], read if HAS_BIAS
    residual_ptr,  # [M, N], read if HAS_RESIDUAL
    y_ptr,  # [M, N], [M, N / 2] if GLU
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    K_TILES: tl.constexpr,
    GROUPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GLU: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WAYS: tl.constexpr,
    PTX: tl.constexpr,
):
    """One block of BLOCK_M tokens by BLOCK_N channels, over all of K in steps of WAYS * 128."""
    tl.static_assert(ROWS % BLOCK_N == 0, "a block lies within one row of packed tiles")
    # blocks of tokens that share weights are neighbours
    m_tiles = tl.cdiv(M, BLOCK_M)
    pid_m = tl.program_id(0) % m_tiles
    pid_n = tl.program_id(0) // m_tiles
    first_m = pid_m.to(tl.int64) * BLOCK_M
    in_block_m = tl.arange(0, BLOCK_M)
    in_m = in_block_m < M - first_m
    first_n = pid_n * BLOCK_N
    in_block_n = tl.arange(0, BLOCK_N)
    offs_n = first_n + in_block_n
    in_n = offs_n < N
    half = tl.arange(0, HALF)
    way = tl.arange(0, WAYS)  # the k tile of a step
    # 64-bit offsets stay in the scalar base; tokens past the end are zeros, unread
    x_ptrs = xq_ptr + first_m * K + in_block_m[None, :, None] * K
    x_ptrs += way[:, None, None] * (2 * HALF) + half[None, None, :]  # [WAYS, BLOCK_M, 64]
    w_ptrs = w_ptr + (first_n // ROWS).to(tl.int64) * (K_TILES * TILE_BYTES)
    w_ptrs += (first_n % ROWS + in_block_n)[None, :, None] * HALF
    w_ptrs += way[:, None, None] * TILE_BYTES + half[None, None, :]  # [WAYS, BLOCK_N, 64]
    word_ptrs = word_ptr + offs_n
    if GROUPED:
        way_word_ptrs = word_ptrs[None, :] + way[:, None] * N  # [WAYS, BLOCK_N]
    acc = tl.zeros((WAYS, BLOCK_N, BLOCK_M), dtype=tl.int32)
    for first_tile in range(0, K_TILES, WAYS):
        if EVEN_K:
            packed = tl.load(w_ptrs)
            x_low = tl.load(x_ptrs, mask=in_m[None, :, None], other=0)
            x_high = tl.load(x_ptrs + HALF, mask=in_m[None, :, None], other=0)
        else:
            # input channels left to each way: one beyond the last tile has none and adds zeros
            left = (K - (first_tile + way) * (2 * HALF))[:, None]  # [WAYS, 1]
            packed = tl.load(w_ptrs, mask=(left > 0)[:, :, None], other=0)
            in_low = in_m[None, :, None] & (half[None, :] < left)[:, None, :]
            in_high = in_m[None, :, None] & (half[None, :] + HALF < left)[:, None, :]
            x_low = tl.load(x_ptrs, mask=in_low, other=0)
            x_high = tl.load(x_ptrs + HALF, mask=in_high, other=0)
        if GROUPED:
            if EVEN_K and EVEN_N:
                word = tl.load(way_word_ptrs)
            elif EVEN_K:
                word = tl.load(way_word_ptrs, mask=in_n[None, :], other=0)
            else:
                word = tl.load(way_word_ptrs, mask=in_n[None, :] & (left > 0), other=0)
            word = tl.broadcast_to(word[:, :, None], (WAYS, BLOCK_N, HALF))
            if PTX:
                w_low, w_high = dequantize_group_ptx(packed, word)
            else:
                w_low, w_high = dequantize_group(packed, word)
            way_word_ptrs += WAYS * N
        elif PTX:
            w_low, w_high = unpack_int4_ptx(packed)
        else:
            w_low, w_high = unpack_int4(packed)
        acc = tl.dot(w_low, x_low.permute(0, 2, 1), acc, out_dtype=tl.int32)
        acc = tl.dot(w_high, x_high.permute(0, 2, 1), acc, out_dtype=tl.int32)
        x_ptrs += WAYS * 2 * HALF
        w_ptrs += WAYS * TILE_BYTES
    total = tl.sum(acc, axis=0)  # [BLOCK_N, BLOCK_M]
    finish(
        total,
        token_scale_ptr,
        token_sum_ptr,
        channel_scale_ptr,
        word_ptr,
        bias_ptr,
        residual_ptr,
        y_ptr,
        first_m,
        first_n,
        M,
        N,
        GROUPED,
        HAS_BIAS,
        HAS_RESIDUAL,
        GLU,
        ROUND_BF16,
        BLOCK_M,
        BLOCK_N,
    )


def start(kernel: Launch, call: GemmCall, y: torch.Tensor) -> None:
    """Launch on checked tensors, see GemmCall; `y` has at least one element."""
    tile = kernel.tile
    n = call.channel_scale.shape[0]
    grid = (ceil_div(call.tokens, tile["BLOCK_M"]) * ceil_div(n, tile["BLOCK_N"]),)
    kernel(
        grid,
        call.xq,
        call.token_scale,
        call.token_sum,
        call.qweight,
        call.channel_scale,
        call.word,
        call.channel_scale if call.bias is None else call.bias,
        y if call.residual is None else call.residual,
        y,
        call.tokens,
    )


def bind(spec: LinearSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `gemm_ways_kernel`."""
    return {
        "N": spec.out_features,
        "K": spec.in_features,
        "K_TILES": ceil_div(spec.in_features, GROUP),
        "GROUPED": spec.group_size == GROUP,
        "EVEN_K": spec.in_features % (tile["WAYS"] * GROUP) == 0,
        "EVEN_N": spec.out_features % tile["BLOCK_N"] == 0,
        "HAS_BIAS": spec.has_bias,
        "HAS_RESIDUAL": spec.has_residual,
        "GLU": spec.glu,
        "ROUND_BF16": spec.dtype == torch.bfloat16 and not tile["PTX"],
        **dict(tile.constexprs),
    }


def tile_of(block_m: int, block_n: int, ways: int, num_stages: int, device: DeviceKey) -> Tile:
    """A tile; with a warp for every way Triton gives each warp a k tile of its own."""
    ptx = int(device.name != INTERPRETED_DEVICE)
    constexprs = (("BLOCK_M", block_m), ("BLOCK_N", block_n), ("WAYS", ways), ("PTX", ptx))
    return Tile(constexprs, ways, num_stages)


def heuristic(spec: LinearSpec, size: int, device: DeviceKey) -> Tile:
    """The smallest block that holds the tokens, 32 at most, and so narrow that SMs are not idle.

    Measured on an H200 with one token at N=K=4096: 32 channels, 4 ways, 4 stages take 6.1 us, where
    gemm_plain takes 8.2.
    """
    block_m = min(MAX_BLOCK_M, max(8, triton.next_power_of_2(size)))
    m_blocks = ceil_div(size, block_m)
    block_n = 16
    for wider in (32, 64):
        # a few SMs without a block cost less than twice as many blocks
        if 10 * m_blocks * ceil_div(spec.out_features, wider) >= 9 * device.sm_count:
            block_n = wider
    for num_stages in (4, 3):
        tile = tile_of(block_m, block_n, 4, num_stages, device)
        if shared_bytes(spec, tile) <= device.shared_bytes:
            return tile
    return tile_of(block_m, 16, 4, 2, device)


def candidates(spec: LinearSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Widths, ways and two depths of stages; only the heuristic's tile where tokens are many."""
    tiles = {heuristic(spec, size, device): None}
    if size > MAX_BLOCK_M:
        return tuple(tiles)
    block_m = max(8, triton.next_power_of_2(size))
    for block_n in (16, 32, 64, 128):
        if block_m * block_n > MAX_SUMS:
            break
        for ways in (4, 8):
            deepest = None
            for num_stages in (8, 6, 4, 3):
                tile = tile_of(block_m, block_n, ways, num_stages, device)
                if shared_bytes(spec, tile) <= device.shared_bytes:
                    deepest = deepest or tile
                    # few stages leave room for more blocks on the SM
                    if tile is deepest or num_stages == 4:
                        tiles[tile] = None
    return tuple(tiles)


def shared_bytes(spec: LinearSpec, tile: Tile) -> int:
    """Weights, activations and words of each stage that is ahead, or the sums of all ways."""
    block_m, block_n, ways = tile["BLOCK_M"], tile["BLOCK_N"], tile["WAYS"]
    words = 4 * block_n if spec.group_size == GROUP else 0
    stage = ways * (block_n * GROUP // 2 + block_m * GROUP + words)
    return max((tile.num_stages - 1) * stage, 4 * ways * block_m * block_n)


def work(spec: LinearSpec, tile: Tile, device: DeviceKey) -> Work:
    """What the blocks of a tile do together."""
    return gemm_work(spec, tile["BLOCK_M"], tile["BLOCK_N"])


SELFCHECK_LAUNCH = """
grid = (triton.cdiv(m, TILE["BLOCK_M"]) * triton.cdiv(n, TILE["BLOCK_N"]),)
gemm_ways_kernel[grid](*arguments, y, m, **options)
"""

GEMM_WAYS = Family(
    "gemm_ways",
    gemm_ways_kernel,
    bind,
    heuristic,
    candidates,
    selfcheck(SELFCHECK_LAUNCH),
    trial_with(start),
    shared_bytes,
    start=start,
    work=work,
)
