"""What a decode step consists of: every kernel with its share, by group, next to its limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.generation.streamers import BaseStreamer

from qoqc.bench.measure import System
from qoqc.codegen.build import OPS
from qoqc.codegen.kernels.few_linear import FEW
from qoqc.codegen.kernels.gemm_forms import GEMM

STEPS = 16
"""Steps looked at."""

SKIPPED = 4
"""Steps before those: the first ones may capture graphs."""


@dataclasses.dataclass(frozen=True)
class Launches:
    """A kernel in one decode step: how often it is launched, and the time it takes altogether."""

    name: str
    group: str
    launches: float
    us: float


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """A decode step. On a CPU its kernels are torch's operators.

    context  tokens in the cache, in the middle of the steps looked at
    busy_us  time per step in which at least one kernel runs
    """

    system: str
    batch: int
    context: int
    busy_us: float
    kernels: tuple[Launches, ...]

    def groups(self) -> list[Launches]:
        """The kernels summed up by group, the longest first."""
        found: dict[str, Launches] = {}
        for kernel in self.kernels:
            known = found.get(kernel.group, Launches(kernel.group, kernel.group, 0, 0))
            found[kernel.group] = dataclasses.replace(
                known, launches=known.launches + kernel.launches, us=known.us + kernel.us
            )
        return sorted(found.values(), key=lambda launches: -launches.us)


class Event(NamedTuple):
    """A kernel that ran, with its times in us."""

    name: str
    start: float
    end: float


def measure_breakdown(system: System, batch: int, context: int) -> Breakdown:
    """Profile STEPS decode steps of one generation around `context` tokens."""
    prompt = max(context - SKIPPED - STEPS // 2, 1)
    generate = system.generator(batch, prompt)
    tokens = SKIPPED + STEPS + 3
    # once without: compilation and capture are not what is looked at
    generate(tokens)
    window = _Window(system.device)
    generate(tokens, streamer=window)
    events = window.events()
    kernels = _summed(events)
    busy = _union(events) / STEPS
    middle = prompt + SKIPPED + STEPS // 2
    return Breakdown(system.name, batch, middle, busy, kernels)


class _Window(BaseStreamer):
    """Profiles from one step of a generation to another; as a streamer it sees each go by."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._cuda = cuda
        self._profile = profile(
            activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        )
        self._seen = 0

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each step's tokens."""
        if self._seen in (SKIPPED, SKIPPED + STEPS):
            # what is still queued belongs to the steps before
            if self._cuda:
                torch.cuda.synchronize(self._device)
            if self._seen == SKIPPED:
                self._profile.start()
            else:
                self._profile.stop()
        self._seen += 1

    def end(self) -> None:
        """Called after the last step."""

    def events(self) -> list[Event]:
        """Everything the device ran; of a CPU's operators what they spent outside of others."""
        found = self._profile.events() or []
        if self._cuda:
            return [
                Event(e.name, e.time_range.start, e.time_range.end)
                for e in found
                if e.device_type.name == "CUDA"
            ]
        return [
            Event(e.name, e.time_range.start, e.time_range.start + e.self_cpu_time_total)
            for e in found
        ]


def group_of(kernel: str) -> str:
    """The group of a kernel: the qoqc op it computes, or what else it is known to be.

    A linear that quantizes its token itself is among the linears: their bytes are its limit.
    """
    for op in OPS.values():
        if any(kernel == form.template.fn.__name__ for form in op.forms):
            return GEMM.name if op is FEW else op.name
    lower = kernel.lower()
    if lower.startswith("triton_"):
        return "inductor"
    if any(word in lower for word in ("gemm", "gemv", "nvjet", "cutlass", "splitk", "xmma")):
        return "16-bit matmul"
    if any(word in lower for word in ("flash", "fmha", "sdpa", "attention")):
        return "16-bit attention"
    return "copies" if lower.startswith(("memcpy", "memset")) else "torch"


def _summed(events: Iterable[Event]) -> tuple[Launches, ...]:
    found: dict[str, list[float]] = {}
    for name, start, end in events:
        found.setdefault(name, []).append(end - start)
    kernels = [
        Launches(name, group_of(name), len(times) / STEPS, sum(times) / STEPS)
        for name, times in found.items()
    ]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.us))


def _union(events: Iterable[Event]) -> float:
    """The time in which at least one of the events is going on."""
    total, reached = 0.0, float("-inf")
    for _, start, end in sorted(events, key=lambda event: event.start):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
