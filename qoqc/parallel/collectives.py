"""What ranks tell each other while the model runs: sums behind o and down, pieces of logits.

They are torch's functional collectives: plain calls in a captured graph, which our passes leave
alone and Inductor runs in place; NCCL's can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives  # noqa: F401  has their shape functions

from qoqc.ir.spec import GROUP
from qoqc.parallel.cut import Cut
from qoqc.parallel.ranks import Ranks

# not by the functions of that module: in eager they give a tensor class of their own, for which
# our ops have no kernels
_ops = torch.ops._c10d_functional
_all_reduce = _ops.all_reduce.default
_all_gather = _ops.all_gather_into_tensor.default
_wait = _ops.wait_tensor.default


def summed(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x [...], the same bits on all of them, in the dtype of x."""
    return cast("Tensor", _wait(_all_reduce(x, "sum", group)))


def gathered(x: Tensor, size: int, group: str) -> Tensor:
    """The ranks' x [..., n] side by side: [..., size * n]."""
    pieces = _wait(_all_gather(x.contiguous(), size, group))  # [size * rows, ...]
    return torch.cat(pieces.chunk(size), dim=-1)


def of_first(x: Tensor, size: int, group: str) -> Tensor:
    """The first rank's x [...], on all of them."""
    return cast("Tensor", _wait(_all_gather(x.contiguous(), size, group)).chunk(size)[0])


def with_largest(x: Tensor, padding: int, group: str) -> Tensor:
    """x [..., k] in fp32, and `padding` more channels: zeros, but for the largest |x| of all ranks.

    It is the first of the last 128 channels, where the weight has a group of zeros (cut.py). In
    fp32, so that the linear's outputs are not rounded before they are summed.
    """
    x = x.float()
    largest = _wait(_all_reduce(x.abs().amax(-1, keepdim=True), "max", group))
    return torch.cat((x, F.pad(largest, (padding - GROUP, GROUP - 1))), dim=-1)


def connect(model: Any, parts: Mapping[str, Cut], ranks: Ranks) -> None:
    """Let the split linears of a model exchange what they must, by forward hooks.

    Hooks, because a linear may be torch's or a packed one, and keeps its name and its class.
    All ranks are given the same logits, not only equal ones: compiled code may round otherwise on
    another rank, and ranks that choose different tokens end at different steps.
    """
    for path, cut in parts.items():
        module = model.get_submodule(path)
        if cut.axis == "columns":
            module.register_forward_hook(_sum_behind(ranks.group))
            if cut.whole_outside:
                module.register_forward_pre_hook(_cut_before(cut.start, cut.stop))
            if cut.exact:
                module.register_forward_pre_hook(_largest_before(cut.padding, ranks.group))
        elif cut.whole_outside:
            module.register_forward_hook(_gather_behind(ranks.size, ranks.group))
    head = model.get_output_embeddings()
    if head is not None and not any(model.get_submodule(path) is head for path in parts):
        head.register_forward_hook(_take_first_behind(ranks.size, ranks.group))


def _sum_behind(group: str) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(module: Any, args: Any, y: Tensor) -> Tensor:
        # an exact part gives fp32, the others what the weight is already
        return summed(y, group).to(module.weight.dtype)

    return hook


def _gather_behind(size: int, group: str) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(module: Any, args: Any, y: Tensor) -> Tensor:
        return gathered(y, size, group)

    return hook


def _take_first_behind(size: int, group: str) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(module: Any, args: Any, y: Tensor) -> Tensor:
        return of_first(y, size, group)

    return hook


def _cut_before(start: int, stop: int) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
    def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][..., start:stop],)

    return hook


def _largest_before(padding: int, group: str) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
    def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (with_largest(args[0], padding, group),)

    return hook
