"""The points of benchmarks/attention.py, and ours at each: made, checked and timed."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qoqc.codegen.kernels.rotate_append_call import Append, RotateSpec
from qoqc.codegen.kernels.rotate_append_call import random_call as random_append
from qoqc.codegen.kernels.step_spec import Step, StepSpec, random_step
from qoqc.codegen.tuning.timing import copies_for, timer_for
from qoqc.ir import kv_reference, ops, rotary
from qoqc.ir.spec import PAGE, KVSpec

HEADS, KV_HEADS, DIM = 32, 8, 128
OURS, EQUAL = "kv4", "kv4, equal lengths"
WRONG = "wrong: "
GROWTH = 14
"""A decode step lengthens its cache: timing takes about twice as many steps of each."""

Row = dict[str, Any]
Call = Callable[[int], Any]
"""Attend with cache number `copy`."""


@dataclasses.dataclass(frozen=True)
class Point:
    """`new` tokens for each of `batch` sequences; `context` counts them too."""

    kind: str
    batch: int
    new: int
    context: int

    @property
    def cached_bytes(self) -> int:
        """Of our format: codes, and a word for a key and one for a value."""
        return self.batch * self.context * KV_HEADS * (DIM + 8)

    @property
    def read_bytes(self) -> int:
        """The least that ours reads: the history in our format, the new tokens in bf16."""
        history = self.cached_bytes * (self.context - self.new) // self.context
        return history + self.batch * self.new * (HEADS + 2 * KV_HEADS) * DIM * 2


def fits(point: Point, byte_count: int, device: torch.device) -> bool:
    """Is there room for so many bytes, and as many again to make them?"""
    if device.type == "cpu":
        return True
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return 1.2 * byte_count < free


def backend(name: str, device: torch.device) -> Any:
    """The context in which SDPA runs on one backend; a CPU has the flash one only."""
    chosen = SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION
    return sdpa_kernel(chosen if device.type == "cuda" else SDPBackend.FLASH_ATTENTION)


def steps_of(point: Point, device: torch.device, lengths: torch.Tensor) -> tuple[Call, Step, int]:
    """Our decode steps, the first of them, and the number of caches."""
    # a cache that is timed alone would be used hundreds of times, and grow by as much
    copies = max(2, copies_for(point.cached_bytes))
    spec = StepSpec(HEADS, KVSpec(KV_HEADS, DIM, DIM), torch.bfloat16, "half", DIM)
    steps = []
    for _ in range(copies):
        step = random_step(spec, point.batch, point.context + 2 * PAGE, device)
        step.length.copy_(lengths)
        steps.append(step)
    arguments = [tuple(vars(step).values()) for step in steps]
    return lambda copy: ops.kv4_decode(*arguments[copy]), steps[0], copies


def wrong_step(step: Step) -> str:
    """What is wrong with the first two sequences of a step, or nothing."""
    part = {name: getattr(step, name)[:2] for name in ("q", "k", "v", "length")}
    table = step.block_table[:2]
    names = ("k_pages", "v_pages", "kv_words")
    part |= {name: getattr(step, name)[table.flatten().long()].clone() for name in names}
    part["block_table"] = torch.arange(table.numel(), device=table.device).view_as(table).int()
    part |= {name: getattr(step, name)[:2] for name in ("cos", "sin")}
    twin = dataclasses.replace(step, **{**part, "length": part["length"].clone()})
    want = kv_reference.kv_decode(*vars(twin).values()).double()
    got = ops.kv4_decode(*vars(step).values())[:2].double()
    return _wrong((got - want).norm() / want.norm(), 4e-3)


def decode_row(point: Point, device: torch.device, lengths: torch.Tensor, what: str = OURS) -> Row:
    """Our time for one new token per sequence, of `lengths` tokens before it."""
    # the middle of what is timed is then at the length asked for
    start = (lengths - GROWTH).clamp(min=0)
    call, first, copies = steps_of(point, device, start)
    wrong = wrong_step(first)
    first.length.copy_(start)
    us = timer_for(device)(call, copies)
    return {"what": what, "us": math.nan if wrong else us, "note": wrong}


def ragged_lengths(point: Point, device: torch.device) -> torch.Tensor:
    """Lengths of 1 to the context, all equally likely."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, point.context + 1, (point.batch,), generator=generator).to(device)


def appends_of(point: Point, device: torch.device) -> tuple[list[Append], int]:
    """Projections of the new tokens over caches of what came before."""
    copies = max(2, copies_for(point.read_bytes))
    spec = RotateSpec(HEADS, KVSpec(KV_HEADS, DIM, DIM), torch.bfloat16, "half", DIM)
    history = point.context - point.new
    calls = []
    for _ in range(copies):
        call = random_append(spec, point.batch, point.new, device, cached=history)
        call.k_pages.random_(0, 256)
        call.v_pages.random_(0, 256)
        call.kv_words.fill_(0x2C00 | (0xB800 << 16) - (1 << 32))  # scale 1/16, low -1/2
        call.start.fill_(history)
        calls.append(call)
    return calls, copies


def prefill_row(point: Point, device: torch.device) -> Row:
    """Our time for a prompt, or for a chunk behind a history."""
    calls, copies = appends_of(point, device)
    arguments = [tuple(vars(call).values()) for call in calls]
    length = torch.full((point.batch,), point.context, device=device)
    chunked = point.context > point.new

    def call(copy: int) -> torch.Tensor:
        each = calls[copy]
        q, k = ops.kv4_rotate_append(*arguments[copy])
        if chunked:
            pages = (each.k_pages, each.v_pages, each.kv_words, each.block_table)
            out: torch.Tensor = ops.kv4_attention(
                q, *pages, length, None, k, each.v, DIM**-0.5, each.bits, True
            )
            return out
        with backend("cudnn", device):
            return F.scaled_dot_product_attention(q, k, each.v, is_causal=True, enable_gqa=True)

    wrong = wrong_chunk(calls[0], call(0), length)
    us = timer_for(device)(call, copies)
    return {"what": OURS, "us": math.nan if wrong else us, "note": wrong}


def wrong_chunk(call: Append, out: torch.Tensor, length: torch.Tensor) -> str:
    """What is wrong with the last queries of the first sequence, whose keys are in the cache."""
    assert call.cos is not None and call.sin is not None
    last = slice(-min(64, out.shape[2]), None)
    q = rotary.rotate(call.q[:1, :, last], call.cos[:1, last], call.sin[:1, last], call.form)
    k = rotary.rotate(call.k[:1], call.cos[:1], call.sin[:1], call.form)
    pages = (call.k_pages, call.v_pages, call.kv_words, call.block_table[:1])
    keys, values = kv_reference.kv_dequant(
        *pages, length[:1], k, call.v[:1], call.bits, torch.float32
    )  # fmt: skip
    tokens = int(length[0])
    seen = torch.arange(tokens, device=q.device) < tokens - q.shape[2] + 1 + torch.arange(
        q.shape[2], device=q.device
    ).unsqueeze(1)
    want = F.scaled_dot_product_attention(
        q.float(), keys[:, :, :tokens], values[:, :, :tokens], attn_mask=seen, enable_gqa=True
    ).double()
    error = (out[:1, :, last].double() - want).norm() / want.norm()
    return _wrong(error, 8e-3)  # cuDNN rounds its weights to bf16


def _wrong(error: torch.Tensor, limit: float) -> str:
    return "" if error < limit else f"{WRONG}relative error {float(error):.1e} of {limit}"
