"""The launches of a decode step: attend, for few sequences combine, where not fused append."""

from __future__ import annotations

from typing import Any

import torch

from qoqc.codegen.family import Launch, Tile
from qoqc.codegen.kernels.attention import unit_stride
from qoqc.codegen.kernels.step_schedule import counters_for, grid_for
from qoqc.codegen.kernels.step_spec import Step, StepSpec
from qoqc.quant.pack import ceil_div
from qoqc.runtime.device import sm_count
from qoqc.runtime.workspace import zeroed_counters

SLOTS_PER_SM = 8
"""Warps of step_attend that an SM of sm_80 or sm_90 holds: two on each of its four parts, as up to
255 registers a thread allow. Twelve with 168 registers run code of a third more latency."""

MEETING = 96
"""(sequence, KV head) pairs from which the last block of each adds up its parts itself."""


def launch(
    append: Launch | None, attend: Launch, combine: Launch | None, step: Step, slots: int
) -> torch.Tensor:
    """The output [B, Hq, 1, Dv]; step.length counts the new tokens.

    append   turns q and puts the new token in; None: `attend` does, its tile has FUSED
    combine  adds up parts in a launch of its own; None: the last worker of each sequence and head
    slots    workers the device holds at a time
    The grids follow from shapes alone, so the call can be captured in a CUDA graph.
    """
    batch, heads = step.q.shape[:2]
    out = step.q.new_empty(batch, heads, 1, step.v_pages.shape[2])
    if out.numel() == 0:
        step.length.add_(1)
        return out
    turned = None if append is None else start_append(append, step)
    kv_heads, pages = step.k_pages.shape[1], step.block_table.shape[1]
    part, stat = parts_for(step, grid_for(batch, kv_heads, pages, slots, step.window))
    counters = zeroed_counters(out.device, counters_for(batch, kv_heads))
    start_attend(attend, step, turned, out, part, stat, counters, meet=combine is None)
    if combine is not None:
        start_combine(combine, part, stat, out, step.length, pages, step.window)
    return out


def start_append(kernel: Launch, step: Step) -> tuple[torch.Tensor, ...]:
    """Launch `step_append`: the turned queries [B, Hq, Dk], sums fp32 [B, Hq], units [B, Hkv]."""
    batch, heads, _, k_dim = step.q.shape
    is_tiny = takes_tiny(step.bits, k_dim, step.q.dtype, kernel.tile)
    turned = step.q.new_empty(batch, heads, k_dim, dtype=torch.float16 if is_tiny else None)
    sums = step.q.new_empty(batch, heads, dtype=torch.float32)
    units = step.q.new_empty(batch, step.k.shape[1], dtype=torch.float32)
    q = unit_stride(step.q)
    kernel(
        (batch * step.k.shape[1], 3), q, *q.stride()[:2], *_token(step), *_cache(step),
        turned, sums, units, step.eps, step.block_table.shape[1],
    )  # fmt: skip
    return turned, sums, units


def _token(step: Step) -> tuple[Any, ...]:
    """The arguments of kernels for a new token, but for q: k and v, norm weights, angles."""
    k, v = unit_stride(step.k), unit_stride(step.v)
    angles: list[Any] = []
    for x in (step.cos, step.sin):
        x = k if x is None else unit_stride(x)
        angles += [x, 0 if x.shape[0] == 1 else x.stride(0)]
    return (
        k, *k.stride()[:2], v, *v.stride()[:2],
        k if step.q_weight is None else step.q_weight,
        k if step.k_weight is None else step.k_weight,
        *angles,
    )  # fmt: skip


def _cache(step: Step) -> tuple[Any, ...]:
    """The arguments of kernels for the cache."""
    return (
        step.k_pages, step.v_pages, step.kv_words,
        step.block_table, step.block_table.stride(0), step.length, step.length.stride(0),
    )  # fmt: skip


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
    turned: tuple[torch.Tensor, ...] | None,
    out: torch.Tensor,
    part: torch.Tensor,
    stat: torch.Tensor,
    counters: torch.Tensor,
    *,
    meet: bool,
) -> None:
    """Launch `step_attend`, for what `start_append` gives or, with FUSED, for the step as it is."""
    if turned is None:
        q = sums = units = unit_stride(step.q)
    else:
        q, sums, units = turned
    mask: tuple[Any, ...] = (q, 0, 0)
    if step.mask is not None:
        bools = unit_stride(step.mask)
        stride = 0 if bools.shape[0] == 1 else bools.stride(0)
        mask = (bools.view(torch.uint8), stride, bools.shape[3])
    kernel(
        (part.shape[0],), q, *q.stride()[:2], sums, units, *_token(step), *_cache(step), *mask,
        q if step.sinks is None else step.sinks, out, part, stat, counters,
        step.eps, step.scale, step.softcap, step.batch, step.block_table.shape[1], int(meet),
        step.window,
    )  # fmt: skip


def start_combine(
    kernel: Launch,
    part: torch.Tensor,
    stat: torch.Tensor,
    out: torch.Tensor,
    length: torch.Tensor,
    pages: int,
    window: int,
) -> None:
    """Launch `step_combine` on what `step_attend` left."""
    batch, heads, _, v_dim = out.shape
    grid = (batch * heads, ceil_div(v_dim, kernel.tile["COLUMNS"]))
    workers = part.shape[0]
    kernel(grid, part, stat, out, length, length.stride(0), batch, pages, workers, window)


def meets(spec: StepSpec, batch: int) -> bool:
    """Whether the last block of a sequence and head adds up its parts: where they are few."""
    return batch * spec.kv.kv_heads >= MEETING


def takes_tiny(bits: int, k_dim: int, dtype: torch.dtype, tile: Tile) -> bool:
    """Whether dot products take 4-bit codes as tiny ones (pieces_kv.py): see bind_attend."""
    return bool(tile["PTX"]) and bits == 4 and k_dim % 8 == 0 and dtype != torch.float32


def slots_of(device: torch.device, tile: Tile) -> int:
    """Blocks of a tile that the device holds at a time."""
    return sm_count(device) * max(1, SLOTS_PER_SM // tile.num_warps)
