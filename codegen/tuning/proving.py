"""Run checks that may hang or kill their process, many at a time, each in a process of its own.

A hung kernel cannot be stopped from inside its process, and a fault leaves the CUDA context of
that process unusable: so kernels that have never run do so here, before the process that times.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from qoqc.log import get_logger

log = get_logger("tune")

Check = Callable[[Any], "str | None"]
"""Importable by name: task -> what is wrong, or None."""

START_S = 180.0
"""Time for a process to start and import torch, also when many start at a time."""

STOP_S = 10.0
"""Time for a killed process to end: the driver may hold on to it."""

_FRESH = multiprocessing.get_context("spawn")  # a forked process could not use CUDA


@dataclasses.dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    deadline: float
    task: int | None = None
    ready: bool = False


def failures(
    check: Check,
    tasks: Sequence[Any],
    workers: int,
    timeout_s: float,
    budget_s: float | None = None,
) -> dict[int, str]:
    """Run `check` on every task; what is wrong, by index of the task.

    A check that raises, takes longer than `timeout_s` or kills its process has failed; so have
    those not begun within `budget_s` seconds.
    """
    found: dict[int, str] = {}
    waiting = list(reversed(range(len(tasks))))
    end = float("inf") if budget_s is None else time.monotonic() + budget_s
    pool = [_start(check) for _ in range(min(workers, len(tasks)))]
    try:
        while waiting or any(worker.task is not None for worker in pool):
            if time.monotonic() > end:
                found.update(dict.fromkeys(waiting, "there was no time left to try it"))
                waiting.clear()
            for worker in pool:
                if worker.ready and worker.task is None and waiting:
                    _give(worker, waiting.pop(), tasks, timeout_s)
            # an idle process has no deadline, but one that starts or works has
            live = [worker for worker in pool if not worker.ready or worker.task is not None]
            if not waiting and all(worker.task is None for worker in pool):
                break
            soonest = min((*(worker.deadline for worker in live), end if waiting else float("inf")))
            pause = min(max(0.0, soonest - time.monotonic()), 1.0)
            heard = wait([worker.pipe for worker in live], pause)
            for i, worker in enumerate(pool):
                if worker.pipe in heard:
                    reason = _hear(worker, found, timeout_s)
                elif worker in live and time.monotonic() > worker.deadline:
                    reason = f"no answer within {timeout_s:g} s"
                    if not worker.ready:
                        raise TimeoutError(f"a worker did not start within {START_S:g} s")
                else:
                    continue
                if reason is not None:
                    if worker.task is not None:
                        found[worker.task] = reason
                    _stop(worker)
                    pool[i] = _start(check)
    finally:
        for worker in pool:
            _stop(worker)
    return found


def _start(check: Check) -> _Worker:
    ours, theirs = _FRESH.Pipe()
    process = _FRESH.Process(target=_serve, args=(theirs, check), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, time.monotonic() + START_S)


def _give(worker: _Worker, task: int, tasks: Sequence[Any], timeout_s: float) -> None:
    worker.task, worker.deadline = task, time.monotonic() + timeout_s
    worker.pipe.send((tasks[task],))


def _hear(worker: _Worker, found: dict[int, str], timeout_s: float) -> str | None:
    """Take a worker's answer; the reason if it has none because its process died."""
    try:
        answer = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join(timeout_s)
        if not worker.ready:
            code = worker.process.exitcode
            raise RuntimeError(
                f"a worker process ended while it started, exit code {code}"
            ) from None
        return f"its process died, exit code {worker.process.exitcode}"
    if not worker.ready:
        worker.ready = True
    else:
        assert worker.task is not None
        if answer is not None:
            found[worker.task] = answer
        worker.task = None
    return None


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join(STOP_S)
    if worker.process.is_alive():
        log.warning("worker process %s does not end: is the GPU hung?", worker.process.pid)


def _serve(pipe: Connection, check: Check) -> None:
    """The life of a worker: say that it is ready, then answer one task after the other."""
    pipe.send(None)
    while True:
        try:
            (task,) = pipe.recv()
        except EOFError:
            return
        try:
            answer = check(task)
        except Exception as error:  # whatever a check raises is its result
            answer = f"it failed: {error!r}"
        pipe.send(answer)
