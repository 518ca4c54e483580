"""An engine as the server's event loop sees it: submit a job, take its tokens, cancel it."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from typing import Any

from qoqc.errors import Unsupported
from qoqc.serve.http.errors import ApiError
from qoqc.serve.http.sampling import Sampling, sample_by_request

NO_EOS = -1
"""The engine's word for a request that no token ends."""

START_SECONDS = 600.0
"""Time for the engine's first answer: it compiles the model meanwhile."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What to generate: `max_tokens` tokens after `prompt`, fewer if an end-of-text token comes."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stream: bool = False

    @property
    def is_watched(self) -> bool:
        """Whether tokens are wanted as they come, not only at the end."""
        return self.stream or bool(self.stop)


@dataclasses.dataclass(frozen=True)
class Pages:
    """Pages of the KV cache; a request takes whole ones."""

    free: int
    total: int


class EngineFailed(ApiError):
    """The engine gave up a request (status 500), or is no longer there (503)."""


class Generation:
    """One job in the engine. All methods are for the event loop's thread."""

    def __init__(self, driver: Driver, name: str, job: Job) -> None:
        """Made by Driver.submit."""
        self.job = job
        self.name = name
        self.count = 0
        """Tokens that the engine delivered, taken or not; once cancelled, that it made."""
        self.times: list[float] = []
        """When tokens came, by time.perf_counter."""
        self.done = False
        self._driver = driver
        self._waiting: list[int] = []
        self._failure: ApiError | None = None
        self._news = asyncio.Event()

    async def take(self) -> list[int]:
        """The tokens since the last call, at least one unless `done`; waits for them.

        Of a job that is not watched all come at once.

        Raises what `fail` was given, EngineFailed among it. Tokens that nobody takes wait here: a
        slow reader costs no memory beyond the tokens of its own answer.
        """
        while not (self._waiting or self.done):
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure
        tokens, self._waiting = self._waiting, []
        return tokens

    def fail(self, failure: ApiError) -> None:
        """Cancel it, and let `take` raise `failure`; nothing if it is done."""
        if not self.done:
            self._failure = failure
            self.cancel()
            self._news.set()

    def cancel(self) -> None:
        """Stop generating and give the pages back; nothing if it is done."""
        if not self.done:
            if not self.job.is_watched:
                # the engine delivers nothing of a request that it drops
                so_far = self._driver.so_far(self.name)
                if so_far is not None:
                    self.receive(so_far)
            self.done = True
            self._driver.cancel(self.name)

    def receive(self, output: Any) -> None:
        """Take over a GenerationOutput, which has all tokens so far."""
        if self.done:
            return
        fresh = output.generated_tokens[self.count :]
        self.count += len(fresh)
        self._waiting += fresh
        if not self.job.is_watched:
            self.times = list(output.timestamps or ())
        elif fresh:
            self.times.append(time.perf_counter())
        if output.error is not None:
            status = 500 if self._driver.alive else 503
            message = f"the engine could not finish the request: {output.error}"
            self._failure = EngineFailed(status, message)
        self.done = output.is_finished()
        self._news.set()


class Driver:
    """Runs an engine: a ContinuousBatchingManager of qoqc.serve.engine, or of http/plain.py."""

    def __init__(self, manager: Any, *, greedy: bool = False) -> None:
        """`manager` is not started yet. greedy: leave out sampling, and what it costs a step."""
        self._manager = manager
        self._numbers = 0
        self.greedy = greedy
        self.eos = eos_ids(manager.generation_config.eos_token_id)
        if not greedy:
            sample_by_request(manager)

    @property
    def alive(self) -> bool:
        """Whether the engine takes and answers requests."""
        fatal = self._manager.background_thread_status.fatal_error
        return fatal is None and bool(self._manager.is_running())

    def start(self) -> None:
        """Start the engine and let it answer once, so that all is compiled. Blocks.

        Raises Unsupported if that fails.
        """
        self._manager.warmup()
        self._manager.start()
        self._manager.add_request([0], max_new_tokens=2, eos_token_id=NO_EOS)
        end = time.monotonic() + START_SECONDS
        while (first := self._manager.get_result(timeout=0.1)) is None:
            if not self.alive:
                error = self._manager.background_thread_status.fatal_error
                raise Unsupported(f"the engine does not start: {error}")
            if time.monotonic() > end:
                self.stop()
                raise Unsupported(f"the engine gave no answer within {START_SECONDS:.0f} s")
        if first.error is not None:
            self.stop()
            raise Unsupported(f"the engine fails at its first request: {first.error}")

    def stop(self) -> None:
        """Stop the engine; what it still works on fails. Blocks. May be called again."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)

    def submit(self, job: Job) -> Generation:
        """Hand a job to the engine. Raises EngineFailed if that is dead."""
        self._numbers += 1
        name = f"serve-{self._numbers}"
        generation = Generation(self, name, job)
        self._manager.register_result_handler(name, generation.receive)
        added = None
        if self.alive:
            added = self._manager.add_request(
                job.prompt,
                request_id=name,
                max_new_tokens=job.max_tokens,
                streaming=job.is_watched,
                record_timestamps=not job.is_watched,
                eos_token_id=NO_EOS if job.ignore_eos else sorted(self.eos) or NO_EOS,
                **job.sampling.arguments(secrets.randbits(63)),
            )
        if added is None:
            self._forget(name)
            raise EngineFailed(503, "the engine has stopped: the server must be restarted")
        return generation

    def cancel(self, name: str) -> None:
        """Used by Generation.cancel."""
        self._manager.cancel_request(name)
        self._forget(name)

    def so_far(self, name: str) -> Any:
        """A GenerationOutput with the tokens a request has now, None before it has its first.

        The engine's thread may be about to add one.
        """
        processor = self._manager.batch_processor
        if processor is None:
            return None
        scheduler = processor.scheduler
        # one that was put off waits, and keeps its tokens
        state = scheduler.active_requests.get(name) or scheduler.waiting_requests.get(name)
        return None if state is None else state.to_generation_output()

    def pages(self) -> Pages:
        """Pages now; no pages at all before the engine has its cache."""
        return Pages(self._manager.free_pages or 0, self._manager.total_pages or 0)

    def capacity(self) -> int:
        """Tokens, prompt and answer, of the longest request that the cache can hold."""
        return int(self._manager.request_tokens)

    def _forget(self, name: str) -> None:
        router = self._manager.output_router
        router.result_handlers.pop(name, None)
        # a step that was under way may put one more output of a forgotten request in here
        while self._manager.get_result(timeout=0) is not None:
            pass


def eos_ids(eos_token_id: int | list[int] | None) -> frozenset[int]:
    """The end-of-text tokens of a generation config."""
    if eos_token_id is None:
        return frozenset()
    ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
    return frozenset(token for token in ids if token >= 0)
