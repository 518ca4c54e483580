"""A whole benchmark: the 16-bit model first, then qoqc's, in one process and one report."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from qoqc.bench.breakdown import measure_breakdown
from qoqc.bench.fitting import kv_bytes, largest_batch
from qoqc.bench.limits import decode_limits
from qoqc.bench.measure import System, measure_served, measure_speed
from qoqc.bench.plan import Plan
from qoqc.bench.report import Part, Report
from qoqc.errors import QoqcError
from qoqc.runtime.device import device_key

Build = Callable[[], Any]
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Contest:
    """The two models: made one after the other, so that only one is in memory at a time.

    ours      makes a model that qoqc.compile has compiled
    baseline  makes the 16-bit model, or a reason why there is none
    """

    ours: Build
    baseline: Build | str


def run(contest: Contest, plan: Plan, report: Report, tell: Tell) -> None:
    """Measure all of `plan` into `report`, which is written after every part.

    What does not fit into the memory is noted in the report, not raised.
    """
    if isinstance(contest.baseline, str):
        report.note(contest.baseline)
    elif plan.baseline_batches or (plan.served and plan.served_baseline):
        tell("Loading the 16-bit model")
        system = _baseline(contest.baseline, report)
        if system is not None:
            _speeds(system, plan, plan.baseline_batches, report, tell)
            if plan.served and plan.served_baseline:
                _served(system, plan, report, tell)
        # its static cache and CUDA graphs go with it
        del system
        torch._dynamo.reset()
        _free()
    tell("Loading the packed model")
    start = time.perf_counter()
    system = System("qoqc", contest.ours())
    report.loaded("qoqc", time.perf_counter() - start, _allocated_gib(system.device))
    _speeds(system, plan, plan.batches, report, tell)
    for batch in plan.breakdown:
        tell(f"qoqc: a decode step at batch {batch}, kernel by kernel")
        what = f"breakdown at batch {batch}"
        _guarded(report, what, partial(_take_apart, system, plan, batch))
    if plan.served:
        _served(system, plan, report, tell)


def _baseline(build: Build, report: Report) -> System | None:
    start = time.perf_counter()
    try:
        model = build()
    except torch.OutOfMemoryError as error:
        report.note(f"the 16-bit model does not fit: {str(error).splitlines()[0]}")
        return None
    # with a static cache generate() compiles decoding by Inductor with CUDA graphs; it does so on
    # devices only, and a CPU is faster with the cache that grows
    cuda = model.device.type == "cuda"
    extra = {"cache_implementation": "static"} if cuda else {}
    name = str(model.dtype).removeprefix("torch.")
    report.loaded(name, time.perf_counter() - start, _allocated_gib(model.device))
    return System(name, model, extra)


def _speeds(
    system: System, plan: Plan, batches: tuple[int, ...], report: Report, tell: Tell
) -> None:
    wanted = [(batch, plan.prompt, plan.gen) for batch in batches]
    wanted += [(batch, tokens, 2) for batch, tokens in plan.prefill]
    for batch, prompt, gen in wanted:
        what = f"{system.name}: batch {batch}, {prompt} tokens in, {gen} out"
        tell(what)
        _guarded(report, what, partial(measure_speed, system, batch, prompt, gen))
        _free()


def _served(system: System, plan: Plan, report: Report, tell: Tell) -> None:
    assert plan.served is not None
    prompt, gen = plan.served
    batch = plan.served_batch
    if batch is None:
        batch = largest_batch(system, prompt, gen, fallback=max(plan.batches, default=1))
    tell(f"{system.name}: serving {batch} x {prompt} in, {gen} out")
    report.add(measure_served(system, batch, prompt, gen))
    _free()


def _take_apart(system: System, plan: Plan, batch: int) -> Part:
    found = measure_breakdown(system, batch, plan.prompt + plan.gen // 2)
    if system.device.type != "cuda":
        return found, {}
    model, key = system.model, device_key(system.device)
    limits = decode_limits(model, kv_bytes(model), batch, found.context, key)
    return found, limits


def _guarded(report: Report, what: str, measure: Callable[[], Any]) -> None:
    """Add a measurement to the report; a batch that does not fit becomes a note."""
    try:
        report.add(measure())
    except torch.OutOfMemoryError as error:
        report.note(f"{what}: {str(error).splitlines()[0]}")
    except QoqcError as error:
        report.note(f"{what}: {error}")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocated_gib(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None
