"""The packed weights of one layer, in the order in which their inputs come to be."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qoqc.calibrate.blocks import See, rounded_act
from qoqc.calibrate.forward import Stop
from qoqc.calibrate.hessian import Hessian
from qoqc.calibrate.weight_step import quantize_linear
from qoqc.calibrate.work import LayerWork
from qoqc.quant.weight import PackedWeight, dequantize_weight, rows

DAMPING = 0.01
"""Of the mean diagonal of the Hessian, GPTQ's own number: the least that is ever added."""


def weights_step(
    work: LayerWork,
    transposed: Mapping[str, bool],
    hidden: Sequence[Tensor],
    exact: Sequence[Tensor],
    kv_bits: int,
) -> dict[str, PackedWeight]:
    """Quantize the layer's weights, each on inputs from those quantized before; returns them.

    transposed  parameter -> is it stored [K, N]
    hidden      inputs of the layer, all windows, behind quantized layers
    exact       the same behind exact ones, for the correction
    work.tensors afterwards hold the values that the packed weights stand for.
    """
    done: dict[str, PackedWeight] = {}
    layer = _Layer(work, dict(work.tensors), hidden, exact, kv_bits)
    order = work.blocks.call_order(work.index, list(work.packed), work.tensors, hidden[0])
    for names in order:
        weights = [_dense(work.tensors[name], transposed[name]) for name in names]
        whole = torch.cat(weights)
        hessian, cross, tokens = layer.moments(names[0], list(done))
        channels_per_token = len(hessian) / tokens
        if cross is not None:
            damping = DAMPING + channels_per_token
            whole = corrected(whole, hessian, cross, damping)
            del cross  # a large model's is a gigabyte, and the next step takes several of them
        # what few tokens say of many channels is mostly noise, which GPTQ would take for signal
        options = dataclasses.replace(
            work.recipe.weights(), damping=min(max(DAMPING, channels_per_token / 4), 1.0)
        )
        # one column loop for all that share an input
        name = names[0].removesuffix(".weight")
        found = quantize_linear(whole, hessian, options, name)
        start = 0
        for name, weight in zip(names, weights, strict=True):
            done[name] = rows(found.packed, start, start + len(weight))
            start += len(weight)
            work.tensors[name] = _dense(dequantize_weight(done[name]), transposed[name])
            work.record.errors[name] = found.error or 0.0
    return done


def corrected(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """The weight that makes of the rounded inputs what `weight` makes of the exact ones.

    With x the exact and y the rounded input, hessian E[y y^T] and cross E[x y^T], the least
    squares answer is W + W (cross - hessian) hessian^-1 (the idea of GPTAQ, arXiv 2504.02692,
    taken before GPTQ instead of within). `damping`, a fraction of the mean diagonal, draws it to W.
    """
    h, w = hessian.double(), weight.double()
    wanted = w @ (cross.double() - h)
    h.diagonal().add_(damping * h.diagonal().mean())
    # one right side per output channel, of which there are fewer than a K x K inverse has
    change: Tensor = torch.linalg.solve(h, wanted.t()).t()
    return (w + change).float()


class _Layer:
    """The layer twice: as it is quantized so far, and exact."""

    def __init__(
        self,
        work: LayerWork,
        original: Mapping[str, Tensor],
        hidden: Sequence[Tensor],
        exact: Sequence[Tensor],
        kv_bits: int,
    ) -> None:
        """`original` are the layer's tensors before any weight of it was quantized."""
        self._work = work
        self._original = original
        self._hidden = hidden
        self._exact = exact
        self._kv_bits = kv_bits

    def moments(self, name: str, done: Sequence[str]) -> tuple[Tensor, Tensor | None, int]:
        """E[y y^T] of the inputs y of `name` as the kernel sees them, E[x y^T] with x the exact.

        done  the linears quantized so far. The second is None if the recipe does not correct; the
        third is the number of tokens.
        """
        rounding: dict[str, See] = dict.fromkeys(done, rounded_act)
        hessian: Hessian | None = None
        cross: Tensor | None = None
        for window, x in enumerate(self._hidden):
            y = self._input_of(name, self._work.tensors, x, self._kv_bits, rounding)
            if hessian is None:
                hessian = Hessian(y.shape[-1], name.removesuffix(".weight"), y.device)
            # rounding would hide NaN, which the Hessian refuses
            rounded = rounded_act(y) if bool(torch.isfinite(y).all()) else y
            hessian.add(rounded)
            if self._work.recipe.correct:
                exact = self._input_of(name, self._original, self._exact[window], 16, {})
                product = exact.flatten(0, -2).t() @ rounded.flatten(0, -2)
                cross = product if cross is None else cross.add_(product)
        assert hessian is not None, "call_order() saw this linear called"
        mean = None if cross is None else cross / hessian.tokens
        return hessian.matrix(), mean, hessian.tokens

    def _input_of(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        bits: int,
        watched: Mapping[str, See],
    ) -> Tensor:
        """The input of `name` when the layer runs on `x` with `tensors`."""
        seen: list[Tensor] = []

        def see(y: Tensor) -> None:
            seen.append(y)
            raise Stop

        self._work.blocks.recorder.bits = bits
        with self._work.blocks.watching({**watched, name: see}), contextlib.suppress(Stop):
            self._work.blocks.run(self._work.index, tensors, x)
        return seen[0]


def _dense(weight: Tensor, transposed: bool) -> Tensor:
    return weight.t() if transposed else weight
