"""The choice of the next token on the device, as transformers' logits processors have it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qoqc.decode.buffers import Buffers
from qoqc.ir import ops

SCORES_ONLY = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
"""Processors that are functions of the scores, without waiting for the device."""


ACTIVE: dict[type, Callable[[Any, int], bool]] = {
    MinLengthLogitsProcessor: lambda p, length: length < p.min_length,
    MinNewTokensLengthLogitsProcessor: lambda p, length: (
        length - p.prompt_length_to_skip < p.min_new_tokens
    ),
}
"""Processors that only act on sequences of some lengths, in tokens; they bar ends of sequences."""


def on_device(processor: Any) -> bool:
    """May the processor be part of a captured graph? Exact types: a subclass may do anything."""
    return type(processor) in (*SCORES_ONLY, *ACTIVE, RepetitionPenaltyLogitsProcessor)


class Selection:
    """From logits to the next tokens, in place in `buffers`: everything a step does besides.

    processors  all of them `on_device`
    eos         int64 [n], or None if no token ends a sequence
    pad         int64 [], what finished sequences get
    """

    def __init__(
        self,
        buffers: Buffers,
        processors: Sequence[Any],
        do_sample: bool,
        eos: torch.Tensor | None,
        pad: torch.Tensor | None,
    ) -> None:
        self._buffers = buffers
        self._processors = list(processors)
        self._do_sample = do_sample
        self._eos, self._pad = eos, pad
        # all values that a captured graph holds
        ends = None if eos is None else tuple(eos.tolist())
        given = None if pad is None else int(pad)
        self._fixed = (do_sample, ends, given, *map(_trait, self._processors))

    def key(self, length: int) -> Hashable:
        """Selections with equal keys do the same to sequences of `length` tokens."""
        kinds = [(type(p), p) for p in self._processors]
        return (*self._fixed, *(ACTIVE[kind](p, length) for kind, p in kinds if kind in ACTIVE))

    def __call__(self, logits: torch.Tensor, length: int) -> None:
        """Choose and append tokens after `length` ones, given logits [batch, vocabulary]."""
        buffers = self._buffers
        # the largest is the largest in 16 bit, too
        plain = not self._processors and not self._do_sample
        scores = logits if plain else logits.to(torch.float32)
        for processor in self._processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor:
                scores = penalize(buffers, scores, processor.penalty)
            elif type(processor) in ACTIVE:
                if ACTIVE[type(processor)](processor, length):
                    scores = bar(scores, processor.eos_token_id)
            elif type(processor) is TopPLogitsWarper and scores.is_cuda:
                scores = nucleus(scores, processor)
            else:
                scores = processor(buffers.ids[:, :length], scores)
        tokens = draw(scores) if self._do_sample else first_largest(scores)
        buffers.accept(tokens, self._eos, self._pad)


def _trait(processor: Any) -> Hashable:
    plain = {k: v for k, v in vars(processor).items() if isinstance(v, (int, float))}
    if type(processor) in ACTIVE:
        # what is left of their lengths in a graph is whether they act, see Selection.key
        return (type(processor), tuple(processor.eos_token_id.tolist()))
    return (type(processor), *sorted(plain.items()))


def penalize(buffers: Buffers, scores: torch.Tensor, penalty: float) -> torch.Tensor:
    """RepetitionPenaltyLogitsProcessor on tokens whose number is not known to the host.

    Every token of `buffers.ids` counts that stands before `place` and not before `ignored`.
    """
    vocabulary = scores.shape[-1]
    positions = torch.arange(buffers.ids.shape[1], device=scores.device)
    outside = (positions < buffers.ignored) | (positions >= buffers.place)
    # one more column for what does not count, and tokens the head does not know
    ids = buffers.ids.masked_fill(outside, vocabulary).clamp(max=vocabulary)
    wide = torch.nn.functional.pad(scores, (0, 1))
    seen = wide.gather(1, ids)
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    return wide.scatter(1, ids, seen)[:, :vocabulary]


def bar(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Scores [batch, vocabulary] without `tokens` [n], which the head may not know.

    What the length processors do, but for torch.isin, which sorts and waits for many tokens.
    """
    vocabulary = torch.arange(scores.shape[-1], device=scores.device)
    barred = (vocabulary == tokens.to(scores.device)[:, None]).any(0)
    return scores.masked_fill(barred, -torch.inf)


def nucleus(scores: torch.Tensor, processor: TopPLogitsWarper) -> torch.Tensor:
    """TopPLogitsWarper on fp32 scores [batch, vocabulary] without its sort, which is slow on GPUs.

    Tokens stay by a threshold (ir/sampling.nucleus): where likelier tokens have a probability of
    top_p but for rounding, one more or less may stay, and of tokens with equal scores, or scores
    within 3e-5 of each other, all or none. Nothing else differs.
    """
    top_p = scores.new_full(scores.shape[:1], processor.top_p)
    kept: torch.Tensor = ops.sample_scores(scores, None, top_p, None, processor.filter_value)
    if processor.min_tokens_to_keep > 1:
        best, tokens = scores.topk(min(processor.min_tokens_to_keep, scores.shape[-1]))
        kept = kept.scatter(-1, tokens, best)
    return kept


def ignored_prefix(processors: Iterable[Any]) -> torch.Tensor | int:
    """The leading tokens that a repetition penalty does not count: int, or int64 [batch]."""
    for processor in processors:
        if type(processor) is RepetitionPenaltyLogitsProcessor:
            given: torch.Tensor | int | None = processor.prompt_ignore_length
            return 0 if given is None else given
    return 0


def first_largest(scores: torch.Tensor) -> torch.Tensor:
    """scores.argmax(-1), int64 [batch], the first of equals; NaN counts as largest.

    By pieces of the vocabulary: torch gives few blocks to few rows, and takes 28 us for one of
    128,256 values on an H200.
    """
    width = piece_width(scores.shape[-1])
    top, place = scores.unflatten(-1, (-1, width)).max(-1)
    piece = top.argmax(-1, keepdim=True)
    chosen: torch.Tensor = piece * width + place.gather(-1, piece)
    return chosen.squeeze(-1)


@functools.cache
def piece_width(vocabulary: int) -> int:
    """The divisor of `vocabulary` nearest to its root, from above: pieces are as many as long."""
    root = math.isqrt(max(vocabulary - 1, 0)) + 1
    return next(width for width in range(root, vocabulary + 1) if vocabulary % width == 0)


def draw(scores: torch.Tensor) -> torch.Tensor:
    """Tokens [batch] drawn from softmax(scores [batch, vocabulary]).

    What torch.multinomial does for one sample, with the same random numbers, but for its look at
    the probabilities, for which the host would wait.
    """
    probabilities = scores.softmax(-1)
    race = torch.empty_like(probabilities).exponential_()
    return (probabilities / race).argmax(-1)
