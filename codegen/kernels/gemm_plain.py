"""The plain Triton form of the W4A8 GEMM (kernels/gemm.py says what it computes), for any GPU.

The weights are operand A: unpacked in registers they feed the tensor cores from there (register-A
wgmma on sm_90), where as operand B they would go through shared memory again. So a block computes
y transposed, acc [BLOCK_N, BLOCK_M], over all of K: no split.
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
    grouped_tile,
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


@triton.jit(do_not_specialize=["M"])
def gemm_plain_kernel(
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
    GROUP_M: tl.constexpr,
    PTX: tl.constexpr,
):
    """One block of BLOCK_M tokens by BLOCK_N channels, over all of K in steps of 128."""
    tl.static_assert(ROWS % BLOCK_N == 0, "a block lies within one row of packed tiles")
    pid_m, pid_n = grouped_tile(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), (N + BLOCK_N - 1) // BLOCK_N, GROUP_M
    )
    first_m = pid_m.to(tl.int64) * BLOCK_M
    in_block_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    half = tl.arange(0, HALF)
    # 64-bit offsets stay in the scalar base; tokens past the end read the last one again
    row = tl.minimum(in_block_m, M - first_m - 1).to(tl.int32)
    x_ptrs = xq_ptr + first_m * K + row[:, None] * K + half[None, :]  # [BLOCK_M, 64]
    first_n = pid_n * BLOCK_N
    w_ptrs = w_ptr + (first_n // ROWS).to(tl.int64) * (K_TILES * TILE_BYTES)
    w_ptrs += (first_n % ROWS + tl.arange(0, BLOCK_N))[:, None] * HALF + half[None, :]
    word_ptrs = word_ptr + offs_n
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for k_tile in range(0, K_TILES):
        packed = tl.load(w_ptrs)
        if EVEN_K:
            x_low = tl.load(x_ptrs)
            x_high = tl.load(x_ptrs + HALF)
        else:
            left = K - k_tile * 2 * HALF
            x_low = tl.load(x_ptrs, mask=(half < left)[None, :], other=0)
            x_high = tl.load(x_ptrs + HALF, mask=(half + HALF < left)[None, :], other=0)
        if GROUPED:
            word = tl.load(word_ptrs) if EVEN_N else tl.load(word_ptrs, mask=in_n, other=0)
            word = tl.broadcast_to(word[:, None], (BLOCK_N, HALF))
            if PTX:
                w_low, w_high = dequantize_group_ptx(packed, word)
            else:
                w_low, w_high = dequantize_group(packed, word)
            word_ptrs += N
        elif PTX:
            w_low, w_high = unpack_int4_ptx(packed)
        else:
            w_low, w_high = unpack_int4(packed)
        acc = tl.dot(w_low, x_low.T, acc, out_dtype=tl.int32)
        acc = tl.dot(w_high, x_high.T, acc, out_dtype=tl.int32)
        x_ptrs += 2 * HALF
        w_ptrs += TILE_BYTES
    finish(
        acc,
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
    """The constexprs of `gemm_plain_kernel`."""
    return {
        "N": spec.out_features,
        "K": spec.in_features,
        "K_TILES": ceil_div(spec.in_features, GROUP),
        "GROUPED": spec.group_size == GROUP,
        "EVEN_K": spec.in_features % GROUP == 0,
        "EVEN_N": spec.out_features % tile["BLOCK_N"] == 0,
        "HAS_BIAS": spec.has_bias,
        "HAS_RESIDUAL": spec.has_residual,
        "GLU": spec.glu,
        "ROUND_BF16": spec.dtype == torch.bfloat16 and not tile["PTX"],
        **dict(tile.constexprs),
    }


def tile_of(block_m: int, block_n: int, num_warps: int, num_stages: int, device: DeviceKey) -> Tile:
    """A tile; blocks of tokens that share weights in L2 come in groups of 8."""
    ptx = int(device.name != INTERPRETED_DEVICE)
    constexprs = (("BLOCK_M", block_m), ("BLOCK_N", block_n), ("GROUP_M", 8), ("PTX", ptx))
    return Tile(constexprs, num_warps, num_stages)


def heuristic(spec: LinearSpec, size: int, device: DeviceKey) -> Tile:
    """The smallest block that holds the tokens, 128 at most; narrow ones fill the chip at decode.

    Stages are as many as shared memory holds of at most 4, or 8 where a block is small: decode
    waits for memory only.
    """
    block_m = min(128, max(16, triton.next_power_of_2(size)))
    blocks = ceil_div(size, block_m) * ceil_div(spec.out_features, TILE_N)
    block_n = TILE_N if blocks >= device.sm_count else TILE_N // 2
    num_warps = 8 if block_m * block_n >= 128 * 128 else 4
    for num_stages in (8, 6, 4, 3) if block_m <= 32 else (4, 3):
        tile = tile_of(block_m, block_n, num_warps, num_stages, device)
        if shared_bytes(spec, tile) <= device.shared_bytes:
            return tile
    return tile_of(block_m, block_n, num_warps, 2, device)


def candidates(spec: LinearSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Blocks that hold the tokens or half of them, by channels, warps and stages."""
    tiles = {heuristic(spec, size, device): None}
    widest = min(128, max(16, triton.next_power_of_2(size)))
    for block_m in sorted({widest, max(16, widest // 2)}):
        # 64 channels by 8 warps are left out: Triton gives the two dots of a step different warp
        # layouts on sm_90 and moves the accumulator between them through shared memory
        for block_n, num_warps in ((32, 4), (32, 8), (64, 4), (128, 4), (128, 8)):
            if block_m * block_n < num_warps * 128:
                continue
            deepest = None
            for num_stages in (12, 8, 6, 4, 3):
                tile = tile_of(block_m, block_n, num_warps, num_stages, device)
                if shared_bytes(spec, tile) <= device.shared_bytes:
                    deepest = deepest or tile
                    # few stages leave room for a second block on the SM
                    if tile is deepest or num_stages == 3:
                        tiles[tile] = None
    return tuple(tiles)


def shared_bytes(spec: LinearSpec, tile: Tile) -> int:
    """Weights, activations and group words of each stage in flight, or the epilogue's exchange."""
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    words = 4 * block_n if spec.group_size == GROUP else 0
    stage = block_n * GROUP // 2 + block_m * GROUP + words
    return max(tile.num_stages * stage, 4 * block_m * block_n)


def work(spec: LinearSpec, tile: Tile, device: DeviceKey) -> Work:
    """What the blocks of a tile do together."""
    return gemm_work(spec, tile["BLOCK_M"], tile["BLOCK_N"])


SELFCHECK_LAUNCH = """
grid = (triton.cdiv(m, TILE["BLOCK_M"]) * triton.cdiv(n, TILE["BLOCK_N"]),)
gemm_plain_kernel[grid](*arguments, y, m, **options)
"""

GEMM_PLAIN = Family(
    "gemm_plain",
    gemm_plain_kernel,
    bind,
    heuristic,
    candidates,
    selfcheck(SELFCHECK_LAUNCH),
    trial_with(start),
    shared_bytes,
    start=start,
    work=work,
)
