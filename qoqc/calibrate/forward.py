"""What is done to a forward pass of a module: ended early, replaced, run in TF32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Module


class Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Let GPUs multiply fp32 matrices in TF32: three bits more than the model's own bf16 has.

    For activations alone. Folds, Hessians and the weight step keep all of fp32.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def stopping() -> Iterator[None]:
    """What raises Stop ends here, well."""
    try:
        yield
    except Stop:
        return


@contextmanager
def replaced(module: Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` with another forward."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
