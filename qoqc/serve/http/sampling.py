"""Temperature, top_p and seed of each request in one batch, on an engine that takes the argmax.

transformers' engine chooses between sampling and argmax once, for all requests. Here three of its
per-request logit processors turn argmax into sampling where a request asks for it: scores are
divided by the temperature, cut to the nucleus, and Gumbel noise is added, so that their argmax is
a draw from softmax (Gumbel-max). The noise is a hash of (seed, position, token id): a request with
a seed gets the same tokens whatever else is in the batch, and again after it was preempted. A
greedy request passes all three unchanged, bit for bit. All three are one op, qoqc::sample_scores
(ir/sampling.py), which reads no values on the host, so that CUDA graphs can hold it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from qoqc.ir import ops

COLDEST = 1e-4
"""Temperatures below are greedy: quotients would leave fp32, and no draw would differ."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen; temperature 0 is greedy, seed None is a random one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, always."""
        return self.temperature < COLDEST

    def arguments(self, random_seed: int) -> dict[str, Any]:
        """Keyword arguments of the engine's add_request; `random_seed` stands in for None."""
        if self.greedy:
            return {}
        seed = random_seed if self.seed is None else self.seed
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": seed}


def sample_by_request(manager: Any) -> None:
    """Give a ContinuousBatchingManager that is not started yet these processors.

    Its generation config must have do_sample=False.
    """
    manager.logit_processor = AtOnce()


class AtOnce(ContinuousBatchingLogitsProcessorList):
    """The list of the three processors below: what they do in turn it does in one op."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList([Temperature(), Nucleus(), Gumbel()]))
        # what the list counts itself only for processors that it converted from generate()'s
        self.tensors_required = len(self.logits_processor)

    def __call__(
        self, input_ids: Any, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        """scores [rows, vocabulary] and int32 [3, at least rows] -> the shape of scores."""
        temperature, top_p, key = (
            processor.column(scores, arg)
            for processor, arg in zip(self.logits_processor, logits_processor_args, strict=True)
        )
        return sampled(scores, temperature, top_p, key)


def sampled(
    scores: torch.Tensor,
    temperature: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
) -> torch.Tensor:
    """qoqc::sample_scores: a kernel on a GPU, torch elsewhere; -inf is outside the nucleus."""
    out: torch.Tensor = ops.sample_scores(scores, temperature, top_p, key, -torch.inf)
    return out


class _PerRequest(ContinuousBatchingLogitsProcessor):
    """One number per request, in the 32 bits that the engine carries for a processor."""

    ignored_kwargs: tuple[str, ...] = ()
    dtype = torch.float32
    neutral: float = 1.0

    def number(self, state: Any) -> float | int:
        """The number of a request, from the arguments it was added with."""
        raise NotImplementedError

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Padding rows change nothing."""
        neutral = torch.full_like(int32_tensor, self.neutral, dtype=self.dtype)
        int32_tensor.copy_(neutral.view(torch.int32))

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """The numbers of a batch as int32 [requests]."""
        numbers = [self.number(request.state) for request in requests_with_new_token]
        return torch.tensor(numbers, dtype=self.dtype).view(torch.int32)

    def column(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """The numbers as [rows of scores]."""
        return tensor_arg[: scores.shape[0]].view(self.dtype)


class Temperature(_PerRequest):
    """scores / temperature."""

    supported_kwargs = {"temperature": float}

    def number(self, state: Any) -> float:
        """The divisor; greedy requests have 1."""
        return float(state.logit_processor_kwargs.get("temperature", 1.0))

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] -> the same shape."""
        return sampled(scores, temperature=self.column(scores, tensor_arg))


class Nucleus(_PerRequest):
    """Scores outside the smallest set of likeliest tokens with probability top_p become -inf."""

    supported_kwargs = {"top_p": float}

    def number(self, state: Any) -> float:
        """The probability to keep; greedy requests have 1, which keeps all."""
        return float(state.logit_processor_kwargs.get("top_p", 1.0))

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] -> the same shape."""
        return sampled(scores, top_p=self.column(scores, tensor_arg))


class Gumbel(_PerRequest):
    """scores + noise whose argmax is a draw from softmax(scores); a key of 0 adds nothing."""

    supported_kwargs = {"seed": int}
    dtype = torch.int32
    neutral = 0

    def number(self, state: Any) -> int:
        """The key of this request and position, never 0; greedy requests have 0."""
        seed = state.logit_processor_kwargs.get("seed")
        return 0 if seed is None else noise_key(seed, state.position_offset)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] -> the same shape."""
        return sampled(scores, key=self.column(scores, tensor_arg))


def noise_key(seed: int, position: int) -> int:
    """A nonzero int32 for a seed (64 bit, signed) and the number of tokens before the new one."""
    text = f"{seed}:{position}".encode()
    digest = hashlib.blake2b(text, digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True) or 1
