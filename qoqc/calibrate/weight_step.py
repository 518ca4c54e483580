"""One linear from 16 bit to packed: round to nearest, or clip search, GPTQ, descent and refit."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from qoqc.calibrate.clip import search_grouped, search_per_channel
from qoqc.calibrate.descent import descend
from qoqc.calibrate.gptq import factorize, gptq
from qoqc.calibrate.grid import Grid
from qoqc.calibrate.ranges import plain_grid
from qoqc.errors import OptionError, Unsupported
from qoqc.ir.spec import GROUP
from qoqc.quant.weight import PackedWeight, dequantize_weight, quantize_weight

GROUPED_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Level 1 of g128, where the most shrinking is level 2's to do."""

CHANNEL_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)
"""Per channel; the reference has 80 of them down to 0.2, on the error of groups."""


@dataclasses.dataclass(frozen=True)
class WeightOptions:
    """How weights are quantized.

    group_size  the format: 128, or -1 for per channel
    method      "gptq", or "rtn": round to nearest as quantize_weight does, the control
    clip        search the ranges; without it they are full
    act_order   visit columns in descending order of their mean square input
    passes      times the codes are reconsidered after GPTQ, each as costly as GPTQ itself
    refit       give channel_scale its least-squares value once the codes are chosen
    damping     fraction of the Hessian's mean diagonal that is added to it
    """

    group_size: Literal[128, -1] = 128
    method: Literal["rtn", "gptq"] = "gptq"
    clip: bool = True
    act_order: bool = True
    passes: int = 2
    refit: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.group_size not in (GROUP, -1):
            raise OptionError(f"group_size={self.group_size}: expected {GROUP} or -1")
        if self.method not in ("rtn", "gptq"):
            raise OptionError(f"method={self.method!r}: expected 'rtn' or 'gptq'")
        if self.passes < 0:
            raise OptionError(f"passes={self.passes}: expected 0 or more")
        if not 0 < self.damping <= 1:
            raise OptionError(f"damping={self.damping}: expected a fraction above 0, up to 1")

    def ratios(self) -> tuple[float, ...]:
        """Shrink ratios of the range of an output channel."""
        if not self.clip:
            return (1.0,)
        return GROUPED_RATIOS if self.group_size == GROUP else CHANNEL_RATIOS


@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """The outcome: the packed weight, and figures for the report.

    error     mean squared output error over mean squared output; None without a Hessian
    damping   the fraction of the mean diagonal it took; 0 for rtn
    attempts  factorizations tried; 0 for rtn
    """

    packed: PackedWeight
    error: float | None
    damping: float
    attempts: int


@torch.no_grad()
def quantize_linear(
    weight: torch.Tensor, hessian: torch.Tensor | None, options: WeightOptions, name: str
) -> QuantizedLinear:
    """Quantize `weight` [N, K] of any float dtype for inputs of `hessian` fp32 [K, K].

    hessian  the mean of x x^T (calibrate/hessian.py), on the weight's device; rtn needs none
    name     the layer that errors speak of
    The same arguments give the same bits. Linears that share an input may be stacked along N.
    Raises Unsupported for NaN or infinity in either, or a Hessian that cannot be factorized.
    """
    if not torch.isfinite(weight).all():
        raise Unsupported(f"{name}: the weight holds NaN or infinity; repair the checkpoint")
    if hessian is not None and hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"{name}: a Hessian of shape {tuple(hessian.shape)} for {weight.shape[1]} inputs"
        )
    if options.method == "rtn":
        packed = quantize_weight(weight, options.group_size)
        error = None if hessian is None else output_error(weight, packed, hessian)
        return QuantizedLinear(packed, error, 0.0, 0)
    if hessian is None:
        raise ValueError(f"{name}: gptq needs the Hessian of the layer's inputs")
    w = weight.detach().float()
    factor = factorize(hessian, options.damping, options.act_order, name)
    # damped for every choice: a channel that calibration hardly used must not lose its weights
    mean = hessian.diagonal().mean() if len(hessian) else 0.0
    damped = hessian.clone()
    damped.diagonal().add_(options.damping * mean)
    grid = _choose_grid(w, damped, options)
    codes = descend(w, gptq(w, grid, factor), grid, damped, options.passes)
    if options.refit:
        grid = refit(w, grid, codes, hessian)
    packed = grid.pack(codes)
    return QuantizedLinear(
        packed, output_error(w, packed, hessian), factor.damping, factor.attempts
    )


def _choose_grid(weight: torch.Tensor, hessian: torch.Tensor, options: WeightOptions) -> Grid:
    if not options.clip or 0 in weight.shape:
        return plain_grid(weight, options.group_size)
    search = search_grouped if options.group_size == GROUP else search_per_channel
    return search(weight, hessian, options.ratios())


def refit(weight: torch.Tensor, grid: Grid, codes: torch.Tensor, hessian: torch.Tensor) -> Grid:
    """The grid with channel_scale at its least output error for these codes.

    Of `weight` fp32 [N, K] and integers q, the best factor is (w H q) / (q H q). A channel keeps
    its scale where that is no positive number or no improvement in fp32.
    """
    unit = dataclasses.replace(grid, channel_scale=torch.ones_like(grid.channel_scale))
    q = unit.values(codes).double()
    w, old = weight.double(), grid.channel_scale.double()
    hq = q @ hessian.double()
    cross, square = (w * hq).sum(1), (q * hq).sum(1)
    best = (cross / torch.where(square > 0, square, 1.0)).float()
    new = best.double()
    # the error as a function of the scale is square * s^2 - 2 * cross * s + const
    gain = (square * old - 2 * cross) * old - (square * new - 2 * cross) * new
    take = (square > 0) & torch.isfinite(best) & (best > 0) & (gain > 0)
    return dataclasses.replace(grid, channel_scale=torch.where(take, best, grid.channel_scale))


def output_error(weight: torch.Tensor, packed: PackedWeight, hessian: torch.Tensor) -> float:
    """Mean squared output error of a packed weight over the mean squared output; 0 if both are 0.

    weight [N, K], hessian [K, K] as for quantize_linear.
    """
    w, h = weight.detach().double(), hessian.double()
    delta = dequantize_weight(packed).double() - w
    noise, signal = float(((delta @ h) * delta).sum()), float(((w @ h) * w).sum())
    return noise / signal if signal > 0 else 0.0
