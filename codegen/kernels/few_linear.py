"""Linears of a few tokens that quantize them as well: the launch, and the choice of tiles.

The template is few_kernel.py, the call few_call.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton

from qoqc.codegen.family import Family, Launch, Op, Tile, single
from qoqc.codegen.kernels.few_call import OP, FewCall, FewSpec, Outputs
from qoqc.codegen.kernels.few_kernel import few_linear_kernel
from qoqc.codegen.kernels.few_selfcheck import SELFCHECK
from qoqc.codegen.kernels.few_steps import SLOTS
from qoqc.codegen.kernels.few_trial import trial_with
from qoqc.codegen.kernels.pieces import INTERPRETED_DEVICE, depends_on
from qoqc.ir.spec import GROUP
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import DeviceKey, may_start_early, sm_count

SMALLEST_BLOCK_K = 1024
"""Input channels of a block at least: a warp has a k tile of its own."""

TOLERANCE = 1e-2
"""By how much a linear behind a norm may differ, relative to the largest: norms sum in another
order, and a channel at a border of rounding moves by one of 127 steps. Without a norm: not a bit
(tests/codegen/test_few_linear.py)."""

LARGEST_BLOCK_K = 16384
"""Input channels of a block at most: a token must fit into its registers (29568 spill)."""

AHEAD = 150_000
"""Bytes of shared memory that a block takes: some is left for the next kernel's to start in."""


def start(kernel: Launch, call: FewCall, outputs: Outputs) -> None:
    """Launch on checked tensors, see FewCall; `outputs` as FewCall.empty_outputs made them."""
    tile, tokens = kernel.tile, call.tokens
    steps = ceil_div(call.channel_scale.shape[0], tile["ROWS"])
    if not tokens or not steps:
        return
    x = call.rows(call.x)
    norm_residual = x if call.norm_residual is None else call.rows(call.norm_residual)
    y, total, normed = outputs
    kernel(
        (min(steps, tile["BLOCKS_PER_SM"] * sm_count(x.device)), tokens),
        x,
        x.stride(0),
        norm_residual,
        norm_residual.stride(0),
        x if call.norm_weight is None else call.norm_weight,
        x if call.norm_bias is None else call.norm_bias,
        call.qweight.view(torch.int32),
        call.word,
        call.channel_scale,
        x if call.bias is None else call.bias,
        y if call.residual is None else call.residual,
        y,
        total,
        normed,
        int(may_start_early(x.device)),
        steps,
    )


def bind(spec: FewSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `few_linear_kernel`."""
    linear, norm = spec.linear, spec.norm
    chosen = dict(tile.constexprs)
    del chosen["BLOCKS_PER_SM"]
    return {
        "N": linear.out_features,
        "K": linear.in_features,
        "GROUPED": linear.group_size == GROUP,
        "HAS_BIAS": linear.has_bias,
        "HAS_RESIDUAL": linear.has_residual,
        "GLU": linear.glu,
        "NORMED": norm is not None,
        "EPS": 0.0 if norm is None else norm.eps,
        "OFFSET": 0.0 if norm is None else norm.offset,
        "CENTRED": norm is not None and norm.kind != "rms",
        "ROUND_FIRST": norm is not None and norm.round_first,
        "HAS_NORM_RESIDUAL": norm is not None and norm.has_residual,
        "HAS_NORM_WEIGHT": norm is not None and norm.has_weight,
        "HAS_NORM_BIAS": norm is not None and norm.has_bias,
        "KEEP": norm is not None and norm.keep,
        "BLOCK_K": block_k(spec),
        "WARPS": tile.num_warps,
        **chosen,
    }


def block_k(spec: FewSpec) -> int:
    """The input channels that a block has room for."""
    return max(SMALLEST_BLOCK_K, int(triton.next_power_of_2(spec.linear.in_features)))


def refuses(spec: FewSpec, device: DeviceKey) -> str | None:
    """Why it cannot run there, or None."""
    if device.name == INTERPRETED_DEVICE:
        return "Triton's interpreter does not run Gluon"
    if device.arch < 80:
        return f"sm_{device.arch} is not supported"
    if spec.linear.in_features > LARGEST_BLOCK_K:
        return f"a token of {spec.linear.in_features} channels does not fit into registers"
    least = shared_bytes(spec, heuristic(spec, 1, device))
    if least > device.shared_bytes:
        return f"it takes {least} bytes of shared memory, a block has {device.shared_bytes}"
    return None


def tile_of(rows: int, warps: int, depth: int, blocks: int, device: DeviceKey) -> Tile:
    """A tile: rows at a time, warps that share K, steps ahead, blocks that an SM should hold."""
    constexprs = {"ROWS": rows, "DEPTH": depth, "BLOCKS_PER_SM": blocks}
    return Tile((*constexprs.items(), depends_on(device)), warps, num_stages=1)


def heuristic(spec: FewSpec, size: int, device: DeviceKey) -> Tile:
    """One block on an SM with about 100 KB of weights under way, a thread with 64 or 128 words.

    Measured on an H200, one token, norm and quantization included: 4.8, 3.5, 16.7 and 9.4 us for
    the linears of Llama-3-8B (6144, 4096 and 28672 x 4096, 4096 x 14336), which take 2.9, 1.9,
    13.3 and 6.7 at 4.69 TB/s.
    """
    k = block_k(spec)
    rows = 16 if spec.linear.glu else (8 if k <= 8192 else 4)
    warps = 4 if k <= 4096 else 8
    for depth in (6, 4, 3, 2):
        tile = tile_of(rows, warps, depth, 1, device)
        if shared_bytes(spec, tile) <= min(AHEAD, device.shared_bytes):
            return tile
    return tile_of(rows, warps, 1, 1, device)


def candidates(spec: FewSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Rows, warps and depths: 24 KB or more under way, and a token that fits into registers."""
    tiles = {heuristic(spec, size, device): None}
    k_tiles = block_k(spec) // GROUP
    for rows in (16, 32) if spec.linear.glu else (4, 8, 16):
        for warps in (4, 8, 16):
            ways = ways_of(rows, warps)
            token = 9 * k_tiles // ways
            step = 4 * k_tiles * rows // (8 * warps)
            if ways > k_tiles or token + 2 * step > 200:
                continue
            for blocks in (1, 2):
                for depth in (2, 3, 4, 6):
                    tile = tile_of(rows, warps, depth, blocks, device)
                    held = blocks * shared_bytes(spec, tile)
                    if 24_000 <= held <= device.shared_bytes:
                        tiles[tile] = None
    return tuple(tiles)


def ways_of(rows: int, warps: int) -> int:
    """Into how many parts the threads of a block divide K."""
    return warps * (8 // min(rows, 8))


def shared_bytes(spec: FewSpec, tile: Tile) -> int:
    """Weights and group words of the steps ahead, the token, and sums of SLOTS steps."""
    k, rows = block_k(spec), tile["ROWS"]
    words = 4 if spec.linear.group_size == GROUP else 0
    ahead = tile["DEPTH"] * (k // GROUP) * rows * (GROUP // 2 + words)
    sums = int(SLOTS.value) * ways_of(rows, tile.num_warps) * rows * 16
    return ahead + sums + k + 1024


FEW_LINEAR = Family(
    OP,
    few_linear_kernel,
    bind,
    heuristic,
    candidates,
    SELFCHECK,
    trial_with(start),
    shared_bytes,
    tolerance=TOLERANCE,
    start=start,
    refuses=refuses,
    pdl=True,
)

FEW: Op = single(FEW_LINEAR)
