"""The sm_90 form of the W4A8 GEMM: how tiles are dealt to blocks, and the launch.

The template is in hopper/, the choice of tiles in gemm_hopper_tiles.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qoqc.codegen.family import Launch, Tile
from qoqc.codegen.kernels.gemm import GemmCall
from qoqc.ir.spec import GROUP
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import may_start_early, sm_count
from qoqc.runtime.workspace import zeroed_counters

LINE = 128
"""Bytes of the lines TMA copies: shorter ones take longer per byte."""

_GLUON_DTYPES = {
    torch.int8: gl.int8,
    torch.uint8: gl.uint8,
    torch.int32: gl.int32,
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Persistent blocks, and how many tiles are cut along K into how many parts."""

    blocks: int
    cut: int
    parts: int


@functools.lru_cache(maxsize=4096)
def schedule(tokens: int, channels: int, k_tiles: int, tile: Tile, sm_count: int) -> Schedule:
    """Deal the tiles of y to one block per SM; cut those of the last wave if that fills it.

    A cut tile costs a round trip of its sums through L2, so tiles of full waves stay whole.
    """
    tiles = ceil_div(tokens, tile["BLOCK_M"]) * ceil_div(channels, tile["ROWS"] * tile["BLOCK_N"])
    steps = ceil_div(k_tiles, tile["WAYS"] * tile["UNROLL"])
    rest = tiles % sm_count
    parts = min(tile["SPLIT"], sm_count // rest, steps) if rest else 1
    if parts < 2:
        return Schedule(min(tiles, sm_count), 0, 1)
    return Schedule(min(tiles - rest + rest * parts, sm_count), rest, parts)


def start(kernel: Launch, call: GemmCall, y: torch.Tensor) -> None:
    """Launch on checked tensors, see GemmCall; `y` has at least one element."""
    tile, device = kernel.tile, call.xq.device
    tokens, features = call.tokens, call.spec.in_features
    channels, k_tiles = call.spec.out_features, ceil_div(features, GROUP)
    plan = schedule(tokens, channels, k_tiles, tile, sm_count(device))
    block_m, block_n, rows = tile["BLOCK_M"], tile["BLOCK_N"], tile["ROWS"]
    lines, width = call.qweight.numel() // LINE, y.shape[-1]
    w = descriptor(call.qweight, (lines, LINE), (block_n * GROUP // 2 // LINE, LINE))
    out = descriptor(y, (tokens, width), (block_m, block_n // 2 if call.spec.glu else block_n))
    grouped = call.spec.group_size == GROUP
    kernel(
        (plan.blocks,),
        descriptor(call.xq, (tokens, features), (block_m, LINE)),
        w,
        descriptor(call.word, (k_tiles, channels), (1, block_n)) if grouped else w,
        out,
        out
        if call.residual is None
        else descriptor(call.residual, (tokens, channels), (block_m, block_n)),
        call.token_scale,
        call.token_sum,
        call.channel_scale,
        call.token_sum if grouped else call.word,
        call.channel_scale if call.bias is None else call.bias,
        _workspace(plan.cut * plan.parts * rows * block_n * block_m, call.token_sum),
        zeroed_counters(device, plan.cut * rows) if plan.cut else call.token_sum,
        tokens,
        channels,
        k_tiles,
        int(may_start_early(device)),
        plan.cut,
        plan.parts,
    )


def _workspace(cells: int, unused: torch.Tensor) -> torch.Tensor:
    return torch.empty(cells, dtype=torch.int32, device=unused.device) if cells else unused


def descriptor(tensor: torch.Tensor, shape: tuple[int, int], box: tuple[int, int]) -> Any:
    """What TMA needs to copy boxes of a contiguous tensor, taken as a matrix of `shape`.

    Raises AssertionError for what TMA cannot copy, as Triton's TensorDescriptor does.
    """
    if tensor.data_ptr() % 16:
        tensor = tensor.clone()  # TMA wants bases of 16 bytes
    described = object.__new__(TensorDescriptor)
    vars(described).update(_fields_of(tensor.dtype, shape, box), base=tensor)
    return described


@functools.lru_cache(maxsize=4096)
def _fields_of(dtype: torch.dtype, shape: tuple[int, int], box: tuple[int, int]) -> dict[str, Any]:
    """The fields of a descriptor that Triton has checked, which takes longer than all else.

    A meta tensor, whose address is 0, stands for the tensor.
    """
    rows, columns = shape
    layout = gl.NVMMASharedLayout.get_default_for(list(box), _GLUON_DTYPES[dtype])
    base = torch.empty(shape, dtype=dtype, device="meta")
    # not the tensor's own strides: that of an axis of size 1 may be anything
    fields: dict[str, Any] = vars(
        TensorDescriptor(base, [rows, columns], [columns, 1], list(box), layout)
    )
    return fields
