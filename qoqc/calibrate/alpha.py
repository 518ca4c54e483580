"""Smoothing strengths: the scale that alpha and beta stand for, and the search for the best pair.

A smoothing scale is `absmax(X)^alpha / absmax(W)^beta` per channel (QServe paper, sections 4.3.1
and 4.3.3). The paper's configurations tune alpha by hand per model; here a grid per layer does it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch

from qoqc.errors import OptionError, Unsupported

GRID = 20
"""alpha and beta are multiples of 1 / GRID (the reference implementation's number)."""

FIRST_STEP = 4
"""The search begins with every FIRST_STEP-th multiple and halves the step from there."""

Pair = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One evaluation; an error that was NaN or infinite is recorded as infinity."""

    alpha: float
    beta: float
    error: float


@dataclasses.dataclass(frozen=True)
class Search:
    """The best pair and all trials, in the order they were made."""

    best: Trial
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        plain = self.trials[0].error
        gain = f", {self.best.error / plain:.2f} of the error without" if plain > 0 else ""
        return (
            f"alpha {self.best.alpha:g}, beta {self.best.beta:g}{gain}; {len(self.trials)} trials"
        )


def search_strength(
    error: Callable[[float, float], float],
    name: str,
    *,
    with_beta: bool = True,
    max_trials: int = 20,
    first_step: int = FIRST_STEP,
) -> Search:
    """The pair of the least `error(alpha, beta)` among (0, 0), (a, 0) and (a, 1 - a).

    with_beta   False leaves the last kind out (SmoothAttention)
    max_trials  evaluations at most; the first is always (0, 0), no smoothing
    first_step  4: coarse to fine, at most 19 trials; 1: all 41 pairs, if max_trials allows

    Every trial's error must be on the same scale. A pair whose error is NaN or infinite never
    wins, and of equal ones the earlier does. Raises Unsupported, naming the layer, if the error
    without smoothing is not finite; OptionError if max_trials or first_step is less than 1.
    """
    if max_trials < 1 or first_step < 1:
        raise OptionError(f"max_trials={max_trials}, first_step={first_step}: expected at least 1")
    trials: dict[Pair, Trial] = {}

    def attempt(pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            if pair not in trials and len(trials) < max_trials:
                value = float(error(*pair))
                trials[pair] = Trial(*pair, value if math.isfinite(value) else math.inf)

    def best() -> Trial:
        return min(trials.values(), key=lambda trial: trial.error)

    attempt([(0.0, 0.0)])
    if math.isinf(best().error):
        raise Unsupported(
            f"{name}: the output error without smoothing is NaN or infinite; check the model in "
            "16 bit on the calibration text"
        )
    kinds = (False, True) if with_beta else (False,)
    step = first_step
    # the middle of the range first, so that a small budget is not spent at one end
    coarse = sorted(range(0, GRID + 1, step), key=lambda i: (abs(2 * i - GRID), i))
    for paired in kinds:
        attempt(_pair(i, paired) for i in coarse)
    while step > 1:
        step //= 2
        centre = best()
        place, paired = round(centre.alpha * GRID), centre.beta > 0
        near = [i for i in (place - step, place + step) if 0 <= i <= GRID]
        # towards alpha 1 the two kinds meet
        for kind in kinds if place >= GRID - FIRST_STEP else (paired,):
            attempt(_pair(i, kind) for i in near)
    return Search(best(), tuple(trials.values()))


def _pair(place: int, paired: bool) -> Pair:
    """Multiples of 1 / GRID, each computed in one way, so that equal pairs are equal floats."""
    return place / GRID, ((GRID - place) / GRID if paired else 0.0)


def smoothing_scale(
    activation: torch.Tensor,
    weight: torch.Tensor | None,
    alpha: float,
    beta: float,
    name: str,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scale, fp32 of activation's shape, to divide activations by and multiply weights with.

    activation, weight  largest absolute value of each channel, in any shape; weight for beta > 0
    shared              int64, same shape: channels with equal numbers get one scale, that of their
                        largest values. A channel i rotated together with channel p: min(i, p); a
                        norm shared by heads: the same numbers in every head.

    A channel that is zero in either is left alone (scale 1). Scales are centred on 1 (the
    geometric mean of the largest and the smallest), which changes no rounding but keeps what they
    are folded into within the range of fp16. Raises Unsupported, naming the layer, for NaN or
    infinity.
    """
    # one number for each set, computed once: equal to the last bit for all of its channels
    index = torch.arange(activation.numel(), device=activation.device)
    if shared is not None:
        _, index = torch.unique(shared.to(activation.device).flatten(), return_inverse=True)
    x = _largest(activation, index, "activations", name)
    live = x > 0
    scale = torch.where(live, x, 1.0).pow(alpha)
    if beta:
        if weight is None:
            raise ValueError(f"{name}: beta={beta} needs the weights' largest values")
        w = _largest(weight, index, "weights", name)
        live &= w > 0
        scale = scale / torch.where(w > 0, w, 1.0).pow(beta)
    if bool(live.any()):
        used = scale[live]
        scale = scale / (used.amax() * used.amin()).sqrt()
    return torch.where(live, scale, 1.0).float()[index].view(activation.shape)


def _largest(absmax: torch.Tensor, index: torch.Tensor, what: str, name: str) -> torch.Tensor:
    """The largest of `absmax` in each set, fp64 [sets]; `index` names the set of each channel."""
    if not torch.isfinite(absmax).all():
        raise Unsupported(f"{name}: the {what} hold NaN or infinity; no smoothing scale exists")
    values = absmax.detach().to(index.device, torch.float64).abs().flatten()
    sets = int(index.max()) + 1 if index.numel() else 0
    return values.new_zeros(sets).scatter_reduce(0, index, values, "amax")
