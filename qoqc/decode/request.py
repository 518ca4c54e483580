"""What one call of `generate` asks of the decode loop, and whether the loop can do it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from qoqc.decode.select import on_device
from qoqc.runtime.kv_cache import KV4Cache

PURE = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)
"""Criteria that may be asked about a step more than there is to be: they remember nothing."""

FORWARDED = frozenset(
    {"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
)
"""Arguments of the model's forward that the loop knows how to carry from step to step."""

TOKEN_TYPES = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Arguments that say of which kind each token is, text or a part of an image for instance."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of GenerationMixin._sample."""

    model: Any
    input_ids: torch.Tensor
    processors: Any
    criteria: Any
    config: Any
    streamer: Any
    kwargs: dict[str, Any]

    @property
    def cache(self) -> Any:
        """The cache generate() chose or was given."""
        return self.kwargs.get("past_key_values")

    @property
    def others(self) -> frozenset[str]:
        """The arguments of the model's forward that are none of FORWARDED."""
        given = {k for k, v in self.kwargs.items() if v is not None and v is not False}
        return frozenset(given - FORWARDED)

    @property
    def wants_scores(self) -> bool:
        """Are scores or logits of every step asked for?"""
        given = self.config.output_scores or self.config.output_logits
        return bool(self.config.return_dict_in_generate and given)

    @property
    def selects_on_device(self) -> bool:
        """Can the choice of tokens be captured?"""
        return not self.wants_scores and all(map(on_device, self.processors))

    @property
    def max_length(self) -> int | None:
        """Tokens at which the generation ends."""
        lengths = [c.max_length for c in self.criteria if type(c) is MaxLengthCriteria]
        return min(lengths, default=None)

    @property
    def eos(self) -> torch.Tensor | None:
        """Tokens that end a sequence, or None."""
        ends = [c.eos_token_id for c in self.criteria if type(c) is EosTokenCriteria]
        return torch.cat(ends).to(self.input_ids.device) if ends else None

    @property
    def asked_each_step(self) -> list[Any]:
        """The criteria that are neither counting nor end tokens."""
        known = (EosTokenCriteria, MaxLengthCriteria)
        return [criterion for criterion in self.criteria if type(criterion) not in known]

    @property
    def may_overshoot(self) -> bool:
        """May a step be issued before it is known whether the one before was the last?"""
        return all(type(criterion) in PURE for criterion in self.criteria)


def refusal(request: Request, synced_gpus: bool) -> str | None:
    """Why transformers' own loop must serve the request, whatever its steps are given; or None."""
    model, config = request.model, request.config
    if not isinstance(request.cache, KV4Cache):
        return "the cache is not a KV4Cache"
    if synced_gpus:
        return "GPUs are to step in turn (synced_gpus)"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if config.is_assistant or not request.kwargs.get("use_cache", True):
        return "it generates without a cache, or drafts for another model"
    if request.input_ids.shape[1] == 0 or request.input_ids.device != model.device:
        return "the prompt is not given as tokens on the model's device"
    if model.is_remote_code():
        return f"{type(model).__name__} is code from outside of transformers"
    return None
