"""Perplexity, bits per byte, and the distance from another model's logits, over windows of text.

Perplexity is exp of the mean negative log likelihood of each window's tokens but its first (GPTQ's
protocol, that of the QServe paper's evaluation). Logits live one window at a time.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from qoqc.calibrate.windows import Windows
from qoqc.errors import Unsupported

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""

POSITIONS = 256
"""Positions whose logits are held in fp32 at a time: 0.3 GB at 256k vocabulary."""


@dataclasses.dataclass(frozen=True)
class Score:
    """What one model made of the windows; `nll` is in nats, summed over the predicted tokens."""

    nll: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood of a token; inf where a float cannot hold it."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 709 else mean if math.isnan(mean) else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, so that models with different ones compare."""
        return self.nll / math.log(2) / self.bytes


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A model next to a baseline on the same windows.

    kl         mean over predicted positions of KL(baseline || model), in nats
    agreement  fraction of the positions where both rank the same token first
    seconds    wall clock of both models
    """

    model: Score
    baseline: Score
    kl: float
    agreement: float
    seconds: float

    @property
    def increase(self) -> float:
        """The perplexity above the baseline's, in percent; negative if it is lower."""
        return 100 * (self.model.perplexity / self.baseline.perplexity - 1)


def evaluate(model: Any, windows: Windows, progress: Progress | None = None) -> Score:
    """The score of a causal language model on the windows, without a cache. See Score."""
    total = 0.0
    count = len(windows.tokens)
    for number, chunk in enumerate(windows.tokens):
        total += float(_nll(_logits(model, chunk), chunk).sum())
        if progress is not None:
            progress(number + 1, count)
    return Score(total, windows.predicted, sum(windows.byte_counts))


def compare(
    model: Any, baseline: Any, windows: Windows, progress: Progress | None = None
) -> Comparison:
    """Both models on the windows, side by side, window by window.

    Raises Unsupported if their vocabularies differ in size.
    """
    start = time.perf_counter()
    sums = torch.zeros(4, dtype=torch.float64)  # nll, baseline's nll, KL, agreements
    count = len(windows.tokens)
    for number, chunk in enumerate(windows.tokens):
        ours, theirs = _logits(model, chunk), _logits(baseline, chunk)
        if ours.shape != theirs.shape:
            raise Unsupported(
                f"the model's vocabulary has {ours.shape[-1]} entries, the baseline's "
                f"{theirs.shape[-1]}; a baseline must be the model it was made from"
            )
        sums[0] += _nll(ours, chunk).sum().cpu()
        sums[1] += _nll(theirs, chunk).sum().cpu()
        kl, same = _distance(ours, theirs.to(ours.device))
        sums[2] += kl
        sums[3] += same
        if progress is not None:
            progress(number + 1, count)
    size = sum(windows.byte_counts)
    scores = [Score(float(sums[i]), windows.predicted, size) for i in (0, 1)]
    kl, agreement = (float(sums[i]) / windows.predicted for i in (2, 3))
    return Comparison(scores[0], scores[1], kl, agreement, time.perf_counter() - start)


@torch.no_grad()
def _logits(model: Any, chunk: torch.Tensor) -> torch.Tensor:
    """Logits [seq - 1, V] for all but the last position of one window, in the model's dtype."""
    output = model(input_ids=chunk[None].to(model.device), use_cache=False)
    logits: torch.Tensor = output.logits[0, :-1]
    return logits


def _nll(logits: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood, fp64 [seq - 1], of the window's tokens from the second on."""
    target = chunk[1:].to(logits.device)
    parts = zip(logits.split(POSITIONS), target.split(POSITIONS), strict=True)
    return torch.cat([F.cross_entropy(x.float(), t, reduction="none").double() for x, t in parts])


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """KL(theirs || ours) summed over positions, and how many of them agree on the first token."""
    kl, same = 0.0, 0
    for x, y in zip(ours.split(POSITIONS), theirs.split(POSITIONS), strict=True):
        log_x, log_y = F.log_softmax(x.float(), -1), F.log_softmax(y.float(), -1)
        kl += float(
            F.kl_div(log_x, log_y, reduction="none", log_target=True).sum(-1).double().sum()
        )
        same += int((x.argmax(-1) == y.argmax(-1)).sum())
    return kl, float(same)
