"""What is checked once per kind of call: results kept by the facts of the tensors that gave them.

A decode step or a layer of a prefill calls the same ops with tensors that differ in nothing but
their addresses; to look at their shapes, dtypes and devices anew took longer than to launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

KEPT = 4096
"""Results kept per function, all dropped when there are more: every prompt length has its own."""


def facts(*arguments: Any) -> tuple[Any, ...]:
    """What tells kinds of calls apart: all of an argument, of a tensor all but address and values.

    Of a tensor (shape, strides, dtype, device); with a symbolic size among them it has no hash.
    """
    return tuple(
        [
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x
            for x in arguments
        ]
    )


def by_facts(function: Callable[P, T]) -> Callable[P, T]:
    """`function` run once per kind of call, see `facts`; an error is raised again for every call.

    For functions that read nothing of their tensors but their facts, and whose result holds none
    of them. Calls with keyword arguments or symbolic sizes are not kept. May be called by several
    threads: at worst two of them make the same result.
    """
    kept: dict[tuple[Any, ...], T] = {}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if kwargs:
            return function(*args, **kwargs)
        key = facts(*args)
        try:
            return kept[key]
        except KeyError:
            keep = True
        except TypeError:  # no hash: a graph is looked at, nothing is launched
            keep = False
        made = function(*args, **kwargs)
        if keep:
            if len(kept) >= KEPT:
                kept.clear()
            kept[key] = made
        return made

    return call
