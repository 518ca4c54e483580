"""What calibration made of a model, kept until all of it is known, then handed over at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qoqc.calibrate.checkpoint import Finished
from qoqc.passes.folds.tensors import write_back
from qoqc.quant.weight import PackedWeight, dequantize_weight
from qoqc.runtime.weights import STORE, WeightRef


class Outcome:
    """The finished layers, each tensor where its parameter is.

    The model is not touched before hand_over(), so that an error in the last layer leaves it as
    it was.
    """

    def __init__(self, model: Any, refs: Mapping[str, WeightRef]) -> None:
        """`refs` are the parameters that the product packs, by name."""
        self._model = model
        self._refs = refs
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._packed: dict[str, PackedWeight] = {}
        self._others: dict[str, Tensor] = {}

    def keep(self, finished: Finished) -> None:
        """Take a layer: its packed weights, and the rest in the parameters' own 16 bit."""
        for name, tensor in finished.others.items():
            like = self._parameters[name]
            self._others[name] = tensor.to(like.device, like.dtype)
        for name, weight in finished.packed.items():
            there = self._refs[name].param.device
            moved: dict[str, Any] = {n: t.to(there) for n, t in weight.tensors().items()}
            self._packed[name] = dataclasses.replace(weight, **moved)

    @torch.no_grad()
    def hand_over(self, outside: Mapping[str, Tensor]) -> None:
        """Put it all into the model and the store, with the tensors outside the layers.

        The model must be written before the store, which notices writes.
        """
        write_back(self._model, {**outside, **self._others})
        for name, weight in self._packed.items():
            ref = self._refs[name]
            ref.param.copy_(stored(weight, ref.transposed))
            STORE.adopt(ref, weight)


def stored(weight: PackedWeight, transposed: bool) -> Tensor:
    """The fp32 values of a packed weight, in the shape of its parameter."""
    values = dequantize_weight(weight)
    return values.t() if transposed else values
