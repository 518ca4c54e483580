"""The search: which candidates are worth running, which are right, which is fastest."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from typing import Any

import torch
from triton.runtime.errors import TritonError

from qoqc.codegen.build import FAMILIES, build
from qoqc.codegen.family import Family, Op, Tile, Trial, TwinTrial
from qoqc.codegen.tuning.timing import Timer, copies_for, device_timer
from qoqc.log import get_logger
from qoqc.runtime.device import DeviceKey, device_key

log = get_logger("tune")

PRUNE = 2.0
"""A candidate modelled to take this many times the best modelled time is not run."""

Choice = tuple[Family, Tile]
Results = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Timed:
    """A candidate that gave the right result, and what a call of it takes."""

    choice: Choice
    us: float


def shortlist(op: Op, spec: Any, size: int, device: DeviceKey) -> list[Choice]:
    """The candidates worth running, the heuristic's first, then by modelled time.

    Left out: forms that refuse, tiles beyond the shared memory, tiles whose work alone takes
    PRUNE times as long as that of the best.
    """
    default = op.heuristic(spec, size, device)
    modelled: dict[Choice, float] = {}
    for form in op.usable(spec, device):
        for tile in form.candidates(spec, size, device):
            if form.shared_bytes and form.shared_bytes(spec, tile) > device.shared_bytes:
                continue
            work = form.work(spec, tile, device) if form.work else None
            modelled[form, tile] = work.seconds(size, device) if work else 0.0
    limit = PRUNE * min(modelled.values(), default=0.0)
    kept = [choice for choice, seconds in modelled.items() if seconds <= limit]
    kept.sort(key=lambda choice: modelled[choice])
    return [default, *(choice for choice in kept if choice != default)]


def search(
    op: Op,
    spec: Any,
    size: int,
    device: torch.device,
    timer: Timer = device_timer,
    budget_s: float | None = None,
    excluded: Collection[Choice] = (),
) -> list[Timed]:
    """Time every candidate on the shortlist that gives the right result; fastest first, not empty.

    A candidate that fails to compile or to run, or gives another result than the op's definition,
    is dropped with a warning; if none is left the heuristic's is the answer, in infinite time.
    Once `budget_s` seconds have passed no further candidate is begun. `excluded` ones are not run.
    """
    key = device_key(device)
    started = time.monotonic()
    choices = shortlist(op, spec, size, key)
    timed = []
    bench = _Bench(spec, size, device)
    for done, choice in enumerate(choice for choice in choices if choice not in excluded):
        if done and budget_s is not None and time.monotonic() - started > budget_s:
            log.info("%s: out of time after %d of %d candidates", op.name, done, len(choices))
            break
        form, tile = choice
        us = bench.time(choice, timer)
        if isinstance(us, str):
            log.warning("%s: %s is not considered: %s", form.name, tile, us)
            continue
        log.debug("%s size %d %s %s: %.2f us", op.name, size, form.name, tile, us)
        timed.append(Timed(choice, us))
    return sorted(timed, key=lambda t: t.us) or [Timed(choices[0], float("inf"))]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A candidate in words that another process understands, and the sizes to run it on."""

    form: str
    tile: Tile
    spec: Any
    sizes: tuple[int, ...]
    device: str


def prove(candidate: Candidate) -> str | None:
    """Compile a candidate and run it on every size: what is wrong with it, or None."""
    form = FAMILIES[candidate.form]
    device = torch.device(candidate.device)
    for size in candidate.sizes:
        reason = wrong((form, candidate.tile), candidate.spec, size, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # many processes prove at a time on one GPU
        if reason is not None:
            return f"with {size} tokens {reason}"
    return None


def wrong(choice: Choice, spec: Any, size: int, device: torch.device) -> str | None:
    """What is wrong with the results of a candidate, or None."""
    return _Bench(spec, size, device).wrong(choice)


def measure(
    choice: Choice, spec: Any, size: int, device: torch.device, timer: Timer = device_timer
) -> Timed | str:
    """Check one candidate and time it; what is wrong with it where its result is."""
    bench = _Bench(spec, size, device)
    us = bench.time(choice, timer)
    return us if isinstance(us, str) else Timed(choice, us)


class _Bench:
    """The trial of one form at a time: data of two forms may not fit side by side."""

    def __init__(self, spec: Any, size: int, device: torch.device) -> None:
        self.spec, self.size, self.device = spec, size, device
        self._form: Family | None = None
        self._trial: Trial | None = None
        self._expected: Results = ()

    def time(self, choice: Choice, timer: Timer) -> float | str:
        """Microseconds, or why the candidate cannot win. Without a trial it takes forever."""
        reason = self.wrong(choice)
        if reason is not None:
            return reason
        trial = self._trial
        if trial is None:
            return float("inf")
        kernel = build(choice[0], self.spec, choice[1])
        try:
            if not isinstance(trial, TwinTrial):
                run = trial
                return timer(lambda copy: run(kernel), 1)
            twin, copies = trial, copies_for(trial.cold_bytes)
            twin.rotate(copies)
            result = twin(kernel)
            us = timer(lambda copy: twin(kernel, copy), copies)
        except (RuntimeError, TritonError) as error:
            return f"it failed: {error}"
        # a race may spare the first run
        return us if self._right(choice[0], result) else "it gave other results while it was timed"

    def wrong(self, choice: Choice) -> str | None:
        """Why a candidate cannot win, or None. A form without a trial has nothing to compare."""
        form, tile = choice
        try:
            self._prepare(form)
            if self._trial is None:
                return None
            if isinstance(self._trial, TwinTrial):
                self._trial.clear()
            result = self._trial(build(form, self.spec, tile))
            return None if self._right(form, result) else "it gives other results"
        except (RuntimeError, TritonError) as error:
            return f"it failed: {error}"

    def _prepare(self, form: Family) -> None:
        if form is self._form:
            return
        self._trial, self._expected = None, ()  # let go of the other form's data first
        trial = form.trial(self.spec, self.size, self.device) if form.trial else None
        if isinstance(trial, TwinTrial):
            self._expected = trial.expected()
        elif trial is not None:
            # partial results of a kernel have no definition of their own: the heuristic's stand in
            tile = form.heuristic(self.spec, self.size, device_key(self.device))
            self._expected = tuple(t.clone() for t in trial(build(form, self.spec, tile)))
        self._form, self._trial = form, trial

    def _right(self, form: Family, result: Results) -> bool:
        if isinstance(self._trial, TwinTrial):
            result = self._trial.sample(result)
        pairs = zip(result, self._expected, strict=True)
        return all(_agree(got, want, form.tolerance) for got, want in pairs)


def _agree(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if not tolerance:
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and torch.equal(
            a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
        )
    bound = tolerance * b.float().abs().amax().item()
    return torch.allclose(a.float(), b.float(), rtol=0, atol=bound, equal_nan=True)
