"""Reading ahead: several threads at work on what will be asked for next, within a limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

THREADS = 8
"""At most; one thread copies from the page cache at a few GB/s, and so many fill a PCIe link."""

LIMIT = 1 << 30
"""Bytes read and not yet taken: room for a weight of the largest kind for every thread."""


class ReadAhead:
    """Results of `read` by name, most of them there before they are asked for.

    What is read and was not taken yet has `limit` bytes by `size` together, or is a single result
    that is larger. A context manager: no thread of it runs after the block. Used by one thread.
    """

    def __init__(
        self,
        read: Callable[[str], Any],
        size: Callable[[str], int],
        *,
        threads: int = THREADS,
        limit: int = LIMIT,
    ) -> None:
        """Nothing is read before names are expected; `read` runs in several threads at once."""
        self._read = read
        self._size = size
        self._limit = limit
        self._pool = ThreadPoolExecutor(min(threads, os.cpu_count() or 1), "qoqc-read")
        self._waiting: dict[str, int] = {}
        self._started: dict[str, tuple[Future[Any], int]] = {}
        self._in_flight = 0

    def __enter__(self) -> ReadAhead:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop what was not taken; waits for the reads that run, one per thread at most."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._started.clear()

    def expect(self, names: Iterable[str]) -> None:
        """Read `names`, in this order, behind those expected before."""
        for name in names:
            if name not in self._started:
                self._waiting[name] = self._size(name)
        self._start()

    def take(self, name: str) -> Any:
        """What `read(name)` returned, or raises what it raised; read now if it was not begun.

        Any order will do, the expected one is the fastest. A second time it is read again.
        """
        self._waiting.pop(name, None)
        if name not in self._started:
            return self._read(name)
        future, size = self._started.pop(name)
        try:
            return future.result()
        finally:
            self._in_flight -= size
            self._start()

    def _start(self) -> None:
        """Begin as many as the limit allows: threads never wait for room, so nothing can hang."""
        while self._waiting:
            name, size = next(iter(self._waiting.items()))
            if self._in_flight and self._in_flight + size > self._limit:
                return
            del self._waiting[name]
            self._started[name] = (self._pool.submit(self._read, name), size)
            self._in_flight += size
