"""One model being served: who may come in, what they get, and what was counted."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from qoqc.serve.http.driver import Driver, Generation, Job
from qoqc.serve.http.errors import ApiError, bad_request
from qoqc.serve.http.metrics import Metrics
from qoqc.serve.http.prompts import Bounds
from qoqc.serve.http.protocol import Defaults
from qoqc.serve.http.settings import Settings
from qoqc.serve.http.text import Detokenizer, StopScanner

PIECE_SECONDS = 1e-4
"""A stream shows a piece at most every so many seconds per open request.

A piece costs the event loop some 50 us, and the loop shares the interpreter's lock with the engine:
256 streams of 80 tokens a second would take all of it. Tokens that come meanwhile share a piece.
"""

LONGEST_RETRY = 60
"""Seconds that Retry-After names at most."""

MakeJob = Callable[[Any, Defaults, Bounds], Job]
"""(tokenizer, defaults, bounds) -> the job of a request."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """More text of an answer; reason is set on the last: "stop" or "length"."""

    text: str
    reason: str | None = None


class Service:
    """What the routes use. All methods are for the event loop's thread."""

    def __init__(self, driver: Driver, model: Any, tokenizer: Any, settings: Settings) -> None:
        """`model` is the one the driver's engine runs; its config holds limits and defaults."""
        self.driver = driver
        self.settings = settings
        self.created = int(time.time())
        self.open_requests = 0
        self.metrics = Metrics(lambda: self.open_requests, driver.pages)
        self._tokenizer = tokenizer
        self._config = model.config.get_text_config(decoder=True)
        defaults = Defaults.of(model.generation_config)
        self._defaults = dataclasses.replace(defaults, temperature=0.0, top_p=1.0)
        if not driver.greedy:
            self._defaults = defaults
        # one thread: a long prompt does not stop the streams, and tokenizers are not thread-safe
        self._tokenizing = ThreadPoolExecutor(1, "qoqc-tokenize")
        self._pace: float | None = None
        self._last_end = time.monotonic()

    def bounds(self) -> Bounds:
        """The limits, once the engine has its cache."""
        context = self.driver.capacity()
        longest = getattr(self._config, "max_position_embeddings", None)
        if longest is not None:
            context = min(context, int(longest))
        return Bounds(int(self._config.vocab_size), context, self.settings.max_tokens)

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Count a request as open. Raises ApiError 429 if there are too many."""
        if self.open_requests >= self.settings.max_pending:
            raise ApiError(
                429,
                f"{self.open_requests} requests are open, the most this server takes; try later",
                code="too_many_requests",
                headers={"Retry-After": str(self._retry_after())},
            )
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1
            self._ended()

    async def job(self, make: MakeJob) -> Job:
        """The job of a request. Raises ApiError."""
        loop = asyncio.get_running_loop()
        work = partial(make, self._tokenizer, self._defaults, self.bounds())
        job = await loop.run_in_executor(self._tokenizing, work)
        if self.driver.greedy and not job.sampling.greedy:
            message = "this server was started with --greedy: temperature may only be 0"
            raise bad_request(message, "temperature", "unsupported_parameter")
        return job

    def limit_time(self, generation: Generation, deadline: float) -> asyncio.TimerHandle:
        """Fail the generation at `deadline`, on the event loop's clock; cancel the timer before."""
        message = f"the request took more than {self.settings.timeout:g} s and was cancelled"
        late = ApiError(504, message, code="timeout")
        return asyncio.get_running_loop().call_at(deadline, generation.fail, late)

    async def pieces(self, generation: Generation) -> AsyncIterator[Piece]:
        """The text of a generation as it comes; cancels it at a stop string. Raises ApiError."""
        detokenizer = Detokenizer(self._tokenizer)
        stops = StopScanner(generation.job.stop)
        eos = frozenset() if generation.job.ignore_eos else self.driver.eos
        while True:
            tokens = await generation.take()
            ended = bool(tokens) and tokens[-1] in eos
            text = detokenizer.push(tokens[:-1] if ended else tokens)
            if generation.done:
                text += detokenizer.finish()
            shown, stopped = stops.push(text)
            if stopped:
                generation.cancel()
                yield Piece(shown, "stop")
                return
            if generation.done:
                yield Piece(shown + stops.finish(), "stop" if ended else "length")
                return
            if shown:
                yield Piece(shown)
                await asyncio.sleep(self.open_requests * PIECE_SECONDS)

    def _ended(self) -> None:
        now = time.monotonic()
        gap, self._last_end = now - self._last_end, now
        # an average over some twenty requests
        self._pace = gap if self._pace is None else 0.95 * self._pace + 0.05 * gap

    def _retry_after(self) -> int:
        """Seconds until a place is likely free, from how often requests ended lately."""
        pace = self._pace if self._pace is not None else 1.0
        return min(max(math.ceil(pace), 1), LONGEST_RETRY)
