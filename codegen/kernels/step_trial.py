"""Launches of a decode step's kernels on random data: with these tiles are checked and timed."""

from __future__ import annotations

import torch

from qoqc.codegen.family import Launch, Trial
from qoqc.codegen.kernels.pieces_kv import TINY, TINY_STEP
from qoqc.codegen.kernels.step_call import (
    SLOTS_PER_SM,
    parts_for,
    slots_of,
    start_append,
    start_attend,
    start_combine,
    takes_tiny,
)
from qoqc.codegen.kernels.step_schedule import counters_for, grid_for
from qoqc.codegen.kernels.step_spec import Step, StepSpec, random_step
from qoqc.runtime.device import device_key
from qoqc.runtime.workspace import zeroed_counters

TOKENS = 1000
"""Tokens in the caches of trials."""


def trial_append(spec: StepSpec, size: int, device: torch.device) -> Trial:
    """Append to `size` sequences."""
    step = random_step(spec, size, TOKENS, device)

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        turned, _, _ = start_append(kernel, step)
        # sums depend on the number of warps; units are in the queries too
        return turned, step.k_pages.clone(), step.v_pages.clone(), step.kv_words.clone()

    return run


def trial_attend(spec: StepSpec, size: int, device: torch.device) -> Trial:
    """A step of `size` sequences; without its first kernel where the tile has two."""
    step = random_step(spec, size, TOKENS, device)
    kv, pages = spec.kv, step.block_table.shape[1]
    out = step.q.new_empty(size, spec.heads, 1, kv.v_dim)
    counters = zeroed_counters(device, counters_for(size, kv.kv_heads))

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        step.length.fill_(TOKENS)
        out.fill_(float("nan"))
        slots = slots_of(device, kernel.tile)
        workers = grid_for(size, kv.kv_heads, pages, slots, step.window)
        turned = None
        if not kernel.tile["FUSED"]:
            turned = _turned(step, takes_tiny(kv.bits, kv.k_dim, spec.dtype, kernel.tile))
        start_attend(kernel, step, turned, out, *parts_for(step, workers), counters, meet=True)
        return out.clone(), step.length.clone()

    return run


def _turned(step: Step, is_tiny: bool) -> tuple[torch.Tensor, ...]:
    """What `start_append` gives, but for rotation and the order of channels."""
    q = step.q[:, :, 0].float()
    half = q.shape[2] // 2
    units = torch.ones(step.batch, step.k_pages.shape[1], device=q.device)
    turned = q.to(step.q.dtype)
    if is_tiny:
        units *= 2.0 ** int(TINY)
        turned = torch.cat((q[..., :half], q[..., half:] / int(TINY_STEP)), -1).half()
    return turned.contiguous(), q.sum(-1), units


def trial_combine(spec: StepSpec, size: int, device: torch.device) -> Trial:
    """Add up random parts of `size` sequences of 4,000 tokens, or a window of 1,000."""
    generator = torch.Generator(device).manual_seed(0)
    kv, pages, slots = spec.kv, 64, device_key(device).sm_count * SLOTS_PER_SM
    window = 1000 if spec.has_window else 0
    workers = grid_for(size, kv.kv_heads, pages, slots, window)
    shape = (workers, 2, spec.heads // kv.kv_heads)
    part = torch.randn(*shape, kv.v_dim, generator=generator, device=device)
    stat = torch.rand(*shape, 2, generator=generator, device=device) + 0.5
    out = torch.empty(size, spec.heads, 1, kv.v_dim, dtype=spec.dtype, device=device)
    length = torch.full((size,), 4001, device=device)  # the newest one counted

    def run(kernel: Launch) -> tuple[torch.Tensor, ...]:
        out.fill_(float("nan"))
        start_combine(kernel, part, stat, out, length, pages, window)
        return (out.clone(),)

    return run
