"""What the tuner runs a linear of few tokens on: random tokens, a random weight, cold copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qoqc.codegen.family import Launch
from qoqc.codegen.kernels import gemm_trial, norm_call
from qoqc.codegen.kernels.few_call import FewCall, FewSpec, Outputs, call_of
from qoqc.codegen.kernels.weight_trial import WeightTrial
from qoqc.ir.glue import norm_quant
from qoqc.ir.spec import GROUP
from qoqc.quant.activation import quantize_act

Start = Callable[[Launch, FewCall, Outputs], None]
"""The launcher: kernel, checked tensors, room for the results."""


class FewTrial(WeightTrial[FewCall]):
    """`size` random tokens through norm, quantization and a random weight."""

    def __init__(self, start: Start, spec: FewSpec, size: int, device: torch.device) -> None:
        self._start = start
        self._calls = [random_call(spec, size, device)]
        self._outputs = self._calls[0].empty_outputs()

    def __call__(self, kernel: Launch, copy: int = 0) -> Outputs:
        """The outputs; the next call overwrites them."""
        if self._outputs[0].numel():
            self._start(kernel, self._calls[copy], self._outputs)
        return self._outputs

    def clear(self) -> None:
        """Fill the outputs with NaN."""
        for output in self._outputs:
            output.fill_(float("nan"))

    def expected(self) -> tuple[torch.Tensor, ...]:
        """The definition: that of the quantizing op, then that of the linear."""
        return self.sample(definition(self._calls[0]))

    def sample(self, result: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The outputs that are wanted; all of their rows, which are few."""
        return tuple(output for output in result if output.numel())


def trial_with(start: Start) -> Callable[[FewSpec, int, torch.device], FewTrial]:
    """The `trial` of the family whose launcher is `start`."""

    def trial(spec: FewSpec, size: int, device: torch.device) -> FewTrial:
        return FewTrial(start, spec, size, device)

    return trial


def definition(call: FewCall) -> Outputs:
    """What the ops that the call is made of give, one after the other; x of the call is [M, K]."""
    norm = call.norm
    if norm is None:
        parts, rest = quantize_act(call.x), (call.x.new_empty(0), call.x.new_empty(0))
    else:
        xq, scale, total, summed, normed = norm_quant(
            call.x, call.norm_residual, call.norm_weight, call.norm_bias, norm.kind, norm.eps,
            norm.offset, norm.round_first, norm.keep,
        )  # fmt: skip
        parts, rest = (xq, scale, total), (summed, normed)
    every = torch.arange(call.tokens, device=call.x.device)
    return (gemm_trial.definition(call.quantized(*parts), every), *rest)


def random_call(spec: FewSpec, size: int, device: torch.device) -> FewCall:
    """A call with `size` random tokens and a random weight: the same every time."""
    weights = gemm_trial.random_call(spec.linear, size, device)
    grouped = spec.linear.group_size == GROUP
    if spec.norm is None:
        norm = None
        generator = torch.Generator(device).manual_seed(1)
        shape = (size, spec.linear.in_features)
        x = torch.randn(shape, generator=generator, device=device).to(spec.linear.dtype)
    else:
        norm = norm_call.random_call(spec.norm, size, device)
        x = norm.x
    arguments: dict[str, Any] = {
        "qweight": weights.qweight,
        "channel_scale": weights.channel_scale,
        "group_word": weights.word if grouped else None,
        "channel_zero": None if grouped else weights.word,
        "bias": weights.bias,
        "residual": weights.residual,
    }
    return call_of(x, norm, **arguments, dtype=spec.linear.dtype, glu=spec.linear.glu)
