"""The launches of a decode step: append, attend and, for few sequences, combine."""

from __future__ import annotations

from typing import Any

import torch

from qoqc.codegen.family import Launch, Tile
from qoqc.codegen.kernels.attention import unit_stride
from qoqc.codegen.kernels.step_schedule import counters_for, grid_for
from qoqc.codegen.kernels.step_spec import Step, StepSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import device_key
from qoqc.runtime.workspace import zeroed_counters

SLOTS_PER_SM = 8
"""Warps of step_attend that an SM of sm_80 or sm_90 holds: two on each of its four parts, as up to
255 registers a thread allow. Twelve with 168 registers run code of a third more latency."""

MEETING = 96
"""(sequence, KV head) pairs from which the last block of each adds up its parts itself."""


def launch(
    append: Launch, attend: Launch, combine: Launch | None, step: Step, slots: int
) -> torch.Tensor:
    """Append and attend: the output [B, Hq, 1, Dv]; step.length counts the new tokens.

    combine  adds up parts in a launch of its own; None: the last worker of each sequence and head
    slots    workers the device holds at a time
    The grids follow from shapes alone, so the call can be captured in a CUDA graph.
    """
    batch, heads = step.q.shape[:2]
    out = step.q.new_empty(batch, heads, 1, step.v_pages.shape[2])
    if out.numel() == 0:
        step.length.add_(1)
        return out
    prepared = start_append(append, step)
    kv_heads, pages = step.k_pages.shape[1], step.block_table.shape[1]
    part, stat = parts_for(step, grid_for(batch, kv_heads, pages, slots))
    counters = zeroed_counters(out.device, counters_for(batch, kv_heads))
    start_attend(attend, step, prepared, out, part, stat, counters, meet=combine is None)
    if combine is not None:
        start_combine(combine, part, stat, out, prepared[-1], pages)
    return out


def start_append(kernel: Launch, step: Step) -> tuple[torch.Tensor, ...]:
    """Launch `step_append`; what `step_attend` takes of it.

    The turned queries [B, Hq, Dk], their sums fp32 [B, Hq], units fp32 [B, Hkv] and the lengths
    int32 [B] before the step.
    """
    q, k, v = (unit_stride(x) for x in (step.q, step.k, step.v))
    batch, heads, _, k_dim = q.shape
    angles: list[Any] = []
    for x in (step.cos, step.sin):
        x = q if x is None else unit_stride(x)
        angles += [x, 0 if x.shape[0] == 1 else x.stride(0)]
    is_tiny = takes_tiny(step.bits, k_dim, q.dtype, kernel.tile)
    turned = q.new_empty(batch, heads, k_dim, dtype=torch.float16 if is_tiny else q.dtype)
    sums = q.new_empty(batch, heads, dtype=torch.float32)
    units = q.new_empty(batch, k.shape[1], dtype=torch.float32)
    cached = q.new_empty(batch, dtype=torch.int32)
    kernel(
        (batch * k.shape[1], 3), q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2],
        q if step.q_weight is None else step.q_weight,
        q if step.k_weight is None else step.k_weight,
        *angles, step.k_pages, step.v_pages, step.kv_words,
        step.block_table, step.block_table.stride(0), step.length, step.length.stride(0),
        turned, sums, units, cached, step.eps, step.block_table.shape[1],
    )  # fmt: skip
    return turned, sums, units, cached


def parts_for(step: Step, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the parts of `workers` workers: part and stat, see step_combine.py."""
    kv_heads, v_dim = step.v_pages.shape[1:3]
    shape = (workers, 2, step.q.shape[1] // kv_heads)
    return (
        step.q.new_empty(*shape, v_dim, dtype=torch.float32),
        step.q.new_empty(*shape, 2, dtype=torch.float32),
    )


def start_attend(
    kernel: Launch,
    step: Step,
    prepared: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    part: torch.Tensor,
    stat: torch.Tensor,
    counters: torch.Tensor,
    *,
    meet: bool,
) -> None:
    """Launch `step_attend` for what `start_append` gives."""
    q, sums, units, cached = prepared
    mask: tuple[Any, ...] = (q, 0, 0)
    if step.mask is not None:
        bools = unit_stride(step.mask)
        stride = 0 if bools.shape[0] == 1 else bools.stride(0)
        mask = (bools.view(torch.uint8), stride, bools.shape[3])
    kernel(
        (part.shape[0],), q, sums, units, step.k_pages, step.v_pages, step.kv_words,
        step.block_table, step.block_table.stride(0), step.length, step.length.stride(0), cached,
        *mask, q if step.sinks is None else step.sinks, out, part, stat, counters,
        step.scale, step.softcap, step.batch, step.block_table.shape[1], int(meet),
    )  # fmt: skip


def start_combine(
    kernel: Launch,
    part: torch.Tensor,
    stat: torch.Tensor,
    out: torch.Tensor,
    cached: torch.Tensor,
    pages: int,
) -> None:
    """Launch `step_combine` on what `step_attend` left."""
    batch, heads, _, v_dim = out.shape
    grid = (batch * heads, ceil_div(v_dim, kernel.tile["COLUMNS"]))
    workers = part.shape[0]
    kernel(grid, part, stat, out, cached, batch, pages, workers)


def meets(spec: StepSpec, batch: int) -> bool:
    """Whether the last block of a sequence and head adds up its parts: where they are few."""
    return batch * spec.kv.kv_heads >= MEETING


def takes_tiny(bits: int, k_dim: int, dtype: torch.dtype, tile: Tile) -> bool:
    """Whether dot products take 4-bit codes as tiny ones (pieces_kv.py): see bind_attend."""
    return bool(tile["PTX"]) and bits == 4 and k_dim % 8 == 0 and dtype != torch.float32


def slots_of(device: torch.device, tile: Tile) -> int:
    """Blocks of a tile that the device holds at a time."""
    sm_count: int = device_key(device).sm_count
    return sm_count * max(1, SLOTS_PER_SM // tile.num_warps)
