"""What was compiled and what came from caches, counted; and the demand that nothing is compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton

from qoqc.errors import NotCached
from qoqc.runtime.compile_cache import changed
from qoqc.runtime.dynamo import graphs_compiled

_KERNELS = {True: 0, False: 0}
"""Triton kernels of this process by whether they came from Triton's cache."""

_REQUIRED: list[bool] = []


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Counts of one process: graphs by Inductor, kernels by Triton."""

    graphs: int
    graphs_cached: int
    kernels: int
    kernels_cached: int

    def __sub__(self, other: Compiled) -> Compiled:
        """What was added since `other`."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Compiled(*(new - old for new, old in pairs))


def count() -> Compiled:
    """The counts so far; of kernels, those since the first call or the first compiled graph."""
    _listen()
    return Compiled(*graphs_compiled(), _KERNELS[False], _KERNELS[True])


@contextmanager
def graph_from_cache(name: str, *, required: bool) -> Iterator[None]:
    """Raise NotCached if the block compiles a graph or a kernel, and from now on for kernels.

    Inductor tells only afterwards: the code it made is in the cache then.
    """
    before = count()
    if required and not _REQUIRED:
        _REQUIRED.append(True)
    yield
    made = count() - before
    if required and made.graphs:
        raise NotCached(
            f"{name} was not in the cache of compiled graphs{changed()}, and require_cached is "
            "set; run the model once without it, with the same versions and options"
        )


@functools.cache
def _listen() -> None:
    """Put a listener before the one that may be there."""
    before = triton.knobs.compilation.listener

    def listener(**event: Any) -> None:
        if before is not None:
            before(**event)
        cached = bool(event["cache_hit"])
        _KERNELS[cached] += 1
        if _REQUIRED and not cached:
            raise NotCached(
                f"the kernel {event['src'].name} was not in Triton's cache, and require_cached is "
                "set; run the model once without it, on the same kind of device"
            )

    triton.knobs.compilation.listener = listener
