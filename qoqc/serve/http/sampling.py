"""Temperature, top_p and seed of each request in one batch, on an engine that takes the argmax.

transformers' engine chooses between sampling and argmax once, for all requests. Here three of its
per-request logit processors turn argmax into sampling where a request asks for it: scores are
divided by the temperature, cut to the nucleus, and Gumbel noise is added, so that their argmax is
a draw from softmax (Gumbel-max). The noise is a hash of (seed, position, token id): a request with
a seed gets the same tokens whatever else is in the batch, and again after it was preempted. A
greedy request passes all three unchanged, bit for bit. Nothing here reads values on the host, so
CUDA graphs can hold it.
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

FLOOR = -30.0
"""Log probability, relative to the best token's, below which top_p < 1 keeps nothing: 1e-13."""

HALVINGS = 20
"""Steps of the search for the nucleus' threshold: 30 nats / 2**20 is below fp32's steps there."""


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
    processors = ContinuousBatchingLogitsProcessorList(
        LogitsProcessorList([Temperature(), Nucleus(), Gumbel()])
    )
    # what the list counts itself only for processors that it converted from generate()'s
    processors.tensors_required = len(processors.logits_processor)
    manager.logit_processor = processors


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
        """The numbers as [rows of scores, 1]."""
        return tensor_arg[: scores.shape[0]].view(self.dtype)[:, None]


class Temperature(_PerRequest):
    """scores / temperature."""

    supported_kwargs = {"temperature": float}

    def number(self, state: Any) -> float:
        """The divisor; greedy requests have 1."""
        return float(state.logit_processor_kwargs.get("temperature", 1.0))

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] -> the same shape."""
        return scores / self.column(scores, tensor_arg)


class Nucleus(_PerRequest):
    """Scores outside the smallest set of likeliest tokens with probability top_p become -inf.

    The set's threshold is found by halving, which needs no sort: 20 sums over the vocabulary.
    """

    supported_kwargs = {"top_p": float}

    def number(self, state: Any) -> float:
        """The probability to keep; greedy requests have 1, which keeps all."""
        return float(state.logit_processor_kwargs.get("top_p", 1.0))

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] -> the same shape."""
        top_p = self.column(scores, tensor_arg)
        relative = scores - scores.amax(-1, keepdim=True)
        weights = relative.exp()
        enough = top_p * weights.sum(-1, keepdim=True)
        low = torch.full_like(top_p, FLOOR)
        high = torch.zeros_like(top_p)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            kept = torch.where(relative >= middle, weights, 0).sum(-1, keepdim=True)
            low, high = (
                torch.where(kept >= enough, middle, low),
                torch.where(kept >= enough, high, middle),
            )
        # the best token stays even where top_p is below its own probability
        return scores.masked_fill((relative < low) & (top_p < 1), -torch.inf)


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
        key = self.column(scores, tensor_arg)
        token = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)
        return scores + torch.where(key == 0, 0.0, gumbel_noise(key, token))


def noise_key(seed: int, position: int) -> int:
    """A nonzero int32 for a seed (64 bit, signed) and the number of tokens before the new one."""
    text = f"{seed}:{position}".encode()
    digest = hashlib.blake2b(text, digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def gumbel_noise(key: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, fp32, for int32 keys [rows, 1] and token ids [vocabulary].

    The bits are MurmurHash3's finalizer of key and id, twice; int32 products wrap, as they should.
    """
    bits = _mix(_mix(token * -1640531535) ^ key)  # 2**32 / golden ratio, odd
    # 31 bits: the smallest values of `uniform` are the largest noise, so they want fp32's precision
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def _mix(x: torch.Tensor) -> torch.Tensor:
    # >> of a negative int32 drags its sign along, the masks take it off
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * -2048144789  # 0x85EBCA6B
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * -1028477387  # 0xC2B2AE35
    return x ^ ((x >> 16) & 0xFFFF)
