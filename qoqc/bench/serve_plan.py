"""The load of `qoqc bench --serve`: when which request comes, made from a seed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from qoqc.errors import OptionError

FIRST_ID = 3
"""Token ids below are often special tokens."""


@dataclasses.dataclass(frozen=True)
class Request:
    """arrival: seconds after the start; prompt: token ids; gen: tokens to generate, exactly."""

    arrival: float
    prompt: list[int]
    gen: int


@dataclasses.dataclass(frozen=True)
class Goals:
    """What a request must keep to be a good one, in seconds.

    first    to its first token
    between  from token to token, the mean after the first
    """

    first: float
    between: float


@dataclasses.dataclass(frozen=True)
class ServePlan:
    """A load.

    requests  how many
    rate      of them per second, arriving as a Poisson process however fast the answers are (an
              open loop); None = all at once
    prompt    median tokens of a prompt
    gen       median tokens of an answer
    spread    standard deviation of the logarithms of both, which are normal; 0 = all the same
    seed      of arrivals, lengths and tokens
    warm_up   requests before that, all at once, which are not measured
    goals     for goodput
    """

    requests: int
    rate: float | None
    prompt: int
    gen: int
    spread: float
    seed: int
    warm_up: int
    goals: Goals

    def __post_init__(self) -> None:
        if self.rate is not None and not (self.rate > 0 and math.isfinite(self.rate)):
            raise OptionError(f"--rate {self.rate}: expected requests per second, above 0")
        if not 0 <= self.spread <= 3:
            raise OptionError(f"--spread {self.spread}: expected 0 to 3")
        if min(self.goals.first, self.goals.between) <= 0:
            raise OptionError("--slo-ttft and --slo-itl: expected milliseconds, above 0")

    def make(self, vocabulary: int, longest: int | None) -> list[Request]:
        """The requests in order of arrival, the same for the same plan and arguments.

        longest  most tokens of prompt and answer together; drawn lengths are cut to fit. Raises
                 OptionError if the medians do not.
        """
        if longest is not None and self.prompt + self.gen > longest:
            asked = self.prompt + self.gen
            raise OptionError(f"{asked} tokens are asked for, the model takes {longest}")
        rng = np.random.default_rng(self.seed)
        arrivals = np.zeros(self.requests)
        if self.rate is not None:
            arrivals = rng.exponential(1 / self.rate, self.requests).cumsum()
        return [
            self._request(rng, float(arrival), vocabulary, longest or 2**31) for arrival in arrivals
        ]

    def make_warm_up(self, vocabulary: int, longest: int | None) -> list[Request]:
        """The requests before: of the same lengths, with other tokens."""
        plan = dataclasses.replace(self, requests=self.warm_up, rate=None, seed=self.seed + 1)
        return plan.make(vocabulary, longest)

    def _request(
        self, rng: np.random.Generator, arrival: float, vocabulary: int, longest: int
    ) -> Request:
        prompt, gen = (
            max(round(median * math.exp(self.spread * rng.standard_normal())), 1)
            for median in (self.prompt, self.gen)
        )
        prompt = min(prompt, longest - 1)
        gen = min(gen, longest - prompt)
        ids = rng.integers(FIRST_ID, vocabulary, prompt)
        return Request(arrival, [int(token) for token in ids], gen)
