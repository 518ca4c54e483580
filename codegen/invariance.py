"""Results that do not depend on how many tokens are computed at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from qoqc.codegen.family import Op
from qoqc.codegen.tuning.choose import MAX_BUCKET

_WANTED: ContextVar[bool] = ContextVar("qoqc_invariant", default=False)


@contextlib.contextmanager
def invariant() -> Iterator[None]:
    """Within it, in this thread, a token's result has the same bits whatever is beside it.

    Integer kernels are so with every tile. Sums of floats (norms) end in other bits with another
    tile, and tiles are chosen by the number of tokens: here the same one does for all numbers.
    """
    token = _WANTED.set(True)
    try:
        yield
    finally:
        _WANTED.reset(token)


def size_for(op: Op, size: int) -> int:
    """The number of tokens by which to choose a kernel of `op` for `size` tokens."""
    if _WANTED.get() and any(form.tolerance for form in op.forms):
        return MAX_BUCKET
    return size
