"""Importing much at once: torch and transformers make a million objects, none of them garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector(*, freeze: bool = False) -> Iterator[None]:
    """Keep the garbage collector from looking at what the block imports, again and again.

    It takes a quarter of the time of importing transformers. freeze: leave all that exists after
    the block out of later collections, too, which is a choice for a program, not for a library.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if was_on:
            gc.enable()
