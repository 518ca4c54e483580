"""A fold is right if the model computes the same in fp64: the bench that measures just that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qoqc.passes.folds.tensors import tensors_of, write_back
from qoqc.passes.structure.discover import structure_of
from qoqc.passes.structure.facts import ModelStructure
from qoqc.testing import tiny_model


class Double(TorchFunctionMode):
    """Models compute norms and softmax in fp32 by name: here every fp32 is fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return Tensor.double(*args)
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def logits(model: Any) -> Tensor:
    """fp64 logits [2, 7, vocabulary] of fixed tokens."""
    tokens = torch.randint(0, 384, (2, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), Double():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    assert found.dtype == torch.float64
    return found


@functools.cache
def structure_by_name(family: str, changes: tuple[tuple[str, Any], ...]) -> ModelStructure:
    """Capturing takes most of a test's time, and depends on the config only."""
    return structure_of(tiny_model(family, **dict(changes)))


class Bench:
    """A tiny fp64 model, its structure with the head untied, its tensors, its logits before."""

    def __init__(self, family: str, **changes: Any) -> None:
        structure = structure_by_name(family, tuple(changes.items()))
        self.model = tiny_model(family, torch.float64, **changes)
        if any(producer.linear.experts for producer in structure.stream.producers):
            self.model.set_experts_implementation("eager")  # the fused product takes no fp64
        self.before = logits(self.model)
        self.tied = structure
        self.tensors, self.structure = tensors_of(self.model, structure)
        self.kept = {name: tensor.clone() for name, tensor in self.tensors.items()}

    def changed(self) -> set[str]:
        """Names of the tensors that are no longer what they were."""
        return {n for n, t in self.tensors.items() if not torch.equal(t, self.kept[n])}

    def error(self) -> float:
        """Write the tensors into the model; largest change of its logits over the largest logit."""
        write_back(self.model, self.tensors)
        return float((logits(self.model) - self.before).abs().max() / self.before.abs().max())


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """bench(family, **config changes)."""
    return Bench


@pytest.fixture
def tolerance() -> float:
    """fp64 rounds at 1e-16; the sums of two layers leave about 1e-14 of it."""
    return 1e-9
