"""The same load on a server, by OpenAI's client: what HTTP and the server add is in the figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from qoqc.bench.serve_load import Answered, Load, summarize
from qoqc.bench.serve_plan import Request, ServePlan
from qoqc.errors import Unsupported

VOCABULARY = 1000
"""Token ids of prompts are below it: the API does not say how many a model has, all have these."""

SECONDS = 3600.0
"""A request that takes longer has failed."""

NO_KEY = "none"
"""OpenAI's client wants a key in any case."""


def measure_url(url: str, api_key: str | None, plan: ServePlan, tell: Callable[[str], Any]) -> Load:
    """Put the load of a plan on a server at `url`, such as http://127.0.0.1:8000.

    The server must take token ids as prompts and the field ignore_eos, as qoqc's and vLLM's do.
    Raises Unsupported if it does not answer; requests that fail are counted.
    """
    return asyncio.run(_measure(url, api_key or NO_KEY, plan, tell))


async def _measure(url: str, key: str, plan: ServePlan, tell: Callable[[str], Any]) -> Load:
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    # openai's own client opens 1,000 connections at most, which would hold back a larger load
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=None)
    http = DefaultAsyncHttpxClient(limits=limits, timeout=SECONDS)
    async with AsyncOpenAI(
        base_url=base, api_key=key, max_retries=0, timeout=SECONDS, http_client=http
    ) as client:
        try:
            models = await client.models.list()
        except openai.APIError as error:
            raise Unsupported(f"--url {url}: {error}") from error
        if not models.data:
            raise Unsupported(f"--url {url}: the server lists no models")
        model = models.data[0].id
        tell(f"{model}: warming up")
        await _drive(client, model, plan.make_warm_up(VOCABULARY, None))
        tell(f"{model}: {plan.requests} requests")
        answered = await _drive(client, model, plan.make(VOCABULARY, None))
    return summarize(f"{model} at {url}", answered, plan.goals, over_http=True)


async def _drive(client: AsyncOpenAI, model: str, requests: Sequence[Request]) -> list[Answered]:
    start = time.perf_counter()

    async def answer(request: Request) -> Answered:
        await asyncio.sleep(request.arrival - (time.perf_counter() - start))
        times: list[float] = []
        tokens = 0
        error = None
        try:
            stream = await client.completions.create(
                model=model,
                prompt=request.prompt,
                max_tokens=request.gen,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for chunk in stream:
                if chunk.choices:
                    times.append(time.perf_counter() - start)
                if chunk.usage is not None:
                    tokens = chunk.usage.completion_tokens
        except openai.APIError as failure:
            error = str(failure).splitlines()[0]
        if error is None and tokens != request.gen:
            error = f"{tokens} tokens came, {request.gen} were asked for"
        return Answered(request.arrival, len(request.prompt), tokens, tokens, tuple(times), error)

    return await asyncio.gather(*map(answer, requests))
