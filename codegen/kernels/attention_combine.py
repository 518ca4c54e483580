"""Add up the splits of attention_decode: partial sums, peaks and totals -> the output rows.

part fp32 [B, Hq, S, splits, Dv], stat fp32 [B, Hq, S, splits, 2] -> out [B, Hq, S, Dv]. A row that
saw nothing gives 0; a sequence longer than its table (P * 64 tokens) gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qoqc.codegen.family import Family, Launch, Tile, Trial
from qoqc.codegen.kernels.attention import has_ptx, lanes, round_bf16
from qoqc.codegen.kernels.kv_selfcheck import COMBINE_SELFCHECK
from qoqc.codegen.kernels.pieces import round_to_bf16
from qoqc.ir.spec import AttentionSpec
from qoqc.runtime.device import DeviceKey


@triton.jit(do_not_specialize=["length_stride", "seq", "capacity", "splits"])
def attention_combine(
    part_ptr,
    stat_ptr,
    length_ptr,
    length_stride,
    out_ptr,
    seq,
    capacity,
    splits,
    HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ROUND_BF16: tl.constexpr,
):
    """One output row (sequence, query head, query) per program."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + (row // (HEADS * seq)) * length_stride)
    d = tl.arange(0, BLOCK_V)
    in_d = d < V_DIM
    peak = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        slot = row * splits + s
        peaks = tl.load(stat_ptr + slot * 2, mask=s < splits, other=float("-inf"))
        totals = tl.load(stat_ptr + slot * 2 + 1, mask=s < splits, other=0.0)
        filled = totals != 0  # an empty split has not written its part
        inside = filled[:, None] & in_d[None, :]
        part = tl.load(part_ptr + slot[:, None] * V_DIM + d[None, :], mask=inside, other=0.0)
        new = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(peak - base)
        weight = tl.where(filled, tl.exp2(peaks - base), 0.0)
        total = total * shrink + tl.sum(weight * totals, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        peak = new
    out = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
    out = tl.where(length > capacity, float("nan"), out)
    if ROUND_BF16:
        out = round_to_bf16(out)
    tl.store(out_ptr + row * V_DIM + d, out.to(out_ptr.dtype.element_ty), mask=in_d)


def launch(
    kernel: Launch,
    part: torch.Tensor,
    stat: torch.Tensor,
    length: torch.Tensor,
    out: torch.Tensor,
    capacity: int,
) -> torch.Tensor:
    """Combine part [B, Hq, S, splits, Dv] and stat [B, Hq, S, splits, 2] into out [B, Hq, S, Dv].

    Sequences of more than `capacity` tokens, int64 length [B], give NaN. Returns `out`.
    """
    seq, splits = part.shape[2:4]
    if out.numel():
        grid = (out.shape[:3].numel(),)
        kernel(grid, part, stat, length, length.stride(0), out, seq, capacity, splits)
    return out


def bind(spec: AttentionSpec, tile: Tile) -> dict[str, Any]:
    """The constexprs of `attention_combine`."""
    return {
        "HEADS": spec.heads,
        "V_DIM": spec.kv.v_dim,
        "BLOCK_V": lanes(spec.kv.v_dim),
        "BLOCK_S": tile["BLOCK_S"],
        "ROUND_BF16": round_bf16(spec, tile),
    }


def heuristic(spec: AttentionSpec, size: int, device: DeviceKey) -> Tile:
    """Few warps: a row is at most 64 splits x 256 channels."""
    return _tile(8, 2 if spec.kv.v_dim > 64 else 1, device)


def candidates(spec: AttentionSpec, size: int, device: DeviceKey) -> Sequence[Tile]:
    """Splits per step times warps."""
    tiles = {heuristic(spec, size, device): None}
    for block_s in (4, 8, 16, 32):
        for num_warps in (1, 2, 4):
            tiles[_tile(block_s, num_warps, device)] = None
    return tuple(tiles)


def _tile(block_s: int, num_warps: int, device: DeviceKey) -> Tile:
    return Tile((("PTX", has_ptx(device)), ("BLOCK_S", block_s)), num_warps, num_stages=1)


def trial(spec: AttentionSpec, size: int, device: torch.device) -> Trial:
    """Combine 12 splits of 16 sequences with `size` queries."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (16, spec.heads, size, 12)
    part = torch.randn(*shape, spec.kv.v_dim, generator=generator, device=device)
    stat = torch.rand(*shape, 2, generator=generator, device=device) + 0.5
    length = torch.full((16,), 4096, device=device)
    out = torch.empty(*shape[:3], spec.kv.v_dim, dtype=spec.dtype, device=device)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        return (launch(kernel, part, stat, length, out, 4096).clone(),)

    return run


ATTENTION_COMBINE = Family(
    "attention_combine",
    attention_combine,
    bind,
    heuristic,
    candidates,
    COMBINE_SELFCHECK,
    trial,
    tolerance=1e-2,
    fp_fusion=True,
)
