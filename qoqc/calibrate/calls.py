"""What a block of a decoder is called with, beside the hidden state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qoqc.errors import Unsupported


@dataclasses.dataclass(frozen=True)
class Call:
    """What a block was called with, beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool  # the hidden state is a keyword


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The hidden state among a block's arguments, and whether it is a keyword."""
    if args and isinstance(args[0], Tensor):
        return args[0], False
    found = kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise Unsupported("a block is called without a hidden state; use --recipe rtn")
    return found, True


def first_of(output: Any) -> Tensor:
    """The hidden state among what a block returns."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def to_fp32(value: Any) -> Any:
    """Floating-point tensors in fp32, through tuples, lists and dicts; other things as they are."""
    return _mapped(value, lambda x: x.float() if x.is_floating_point() else x)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors on `device`, through tuples, lists and dicts; other things as they are."""
    return _mapped(value, lambda x: x.detach().to(device) if x.device != device else x)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, change) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if type(value) is dict:
        value = list(value.values())
    if type(value) in (tuple, list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def require_alike(names: Sequence[str], calls: Sequence[Call], others: Sequence[Call]) -> None:
    """Raise Unsupported if calls for two texts differ in anything but the hidden state."""
    for name, call, other in zip(names, calls, others, strict=True):
        ours, theirs = _tensors((call.args, call.kwargs)), _tensors((other.args, other.kwargs))
        same = len(ours) == len(theirs)
        if not same or not all(map(torch.equal, ours, theirs)):
            raise Unsupported(
                f"{name} is given tensors that depend on the text beside its input; it cannot "
                "be run alone; use --recipe rtn"
            )
