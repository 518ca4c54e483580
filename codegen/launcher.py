"""Launches of jitted functions that skip what Triton does anew for each of them.

Triton compiles a variant of a function for each combination of its arguments' types, of pointers
and integers that are multiples of 16, and of integers that are 1. To find it again, JITFunction.run
reads the environment, spells out options and layouts and compares globals, which takes longer than
the launch. Here the CompiledKernel that `run` returned is kept and called as Triton's tutorials do.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def variant(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What tells the variants of a function apart, or more: of types, alignments and ones.

    Raises TypeError for a type of argument that no template takes.
    """
    key: list[Any] = []
    for arg in args:
        if type(arg) is int:
            # 2 and 16 stand for all that no variant of their own is made for
            key.append((2 if arg % 16 else 16) if 1 < arg < 2**31 else arg)
        elif isinstance(arg, torch.Tensor):
            key.append((arg.dtype, "odd") if arg.data_ptr() % 16 else arg.dtype)
        elif type(arg) is float:
            key.append(float)
        elif isinstance(arg, TensorDescriptor):
            key.append((arg.base.dtype, arg.layout, *arg.block_shape))
        else:
            raise TypeError(f"a kernel takes no {type(arg).__name__}: {arg!r}")
    return tuple(key)


class Launcher:
    """Launches one jitted function with the same options every time.

    What Triton's settings say (TRITON_DEBUG, say) counts at the first launch of each variant.
    """

    def __init__(self, fn: Any, options: dict[str, Any]) -> None:
        self._fn = fn
        self._options = options
        # the interpreter has no variants, and the value of a constexpr would tell some apart
        self._keeps = isinstance(fn, JITFunction) and not any(p.is_constexpr for p in fn.params)
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Launch on the current device and stream (or run now, where Triton interprets)."""
        kind = variant(args)
        if not self._keeps:
            self._fn[grid](*args, **self._options)
            return
        # a CompiledKernel is loaded on one device
        key = (driver.active.get_current_device(), kind)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)[:3]](*args)
            return
        compiled = self._fn[grid](*args, **self._options)
        if isinstance(compiled, CompiledKernel):
            self._compiled[key] = compiled
