"""Engines that tests run requests through, and always stop."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import qoqc
from qoqc.errors import Unsupported
from qoqc.serve import releases
from qoqc.serve.engine import engine
from qoqc.testing import VOCAB, tiny_model

STORIES = Path(__file__).resolve().parents[2] / "examples/models/llama-stories-4m"
NO_EOS = -1

Requests = list[tuple[list[int], int]]
"""A prompt and how many tokens to generate, for each request."""

Answer = Callable[..., list[list[int]]]


@pytest.fixture(scope="session")
def host() -> ModuleType:
    """The module that subclasses the installed transformers' manager."""
    try:
        return releases.host()
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(host: ModuleType) -> Any:
    """A random Llama of two layers, compiled; graphs are not, which is what costs time."""
    return qoqc.compile(tiny_model("llama"), glue="eager", prefill_kv="quantized")


@pytest.fixture(scope="session")
def stories(host: ModuleType) -> Any:
    """The bundled model in fp32, compiled as `tiny`."""
    model: Any = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    return qoqc.compile(model, glue="eager", prefill_kv="quantized")


@pytest.fixture
def running(host: ModuleType) -> Callable[..., Any]:
    """A block with an engine that was started."""

    @contextlib.contextmanager
    def run(
        model: Any, *, sharing: bool = True, offload: float = 0.0, **sizes: Any
    ) -> Iterator[Any]:
        greedy = GenerationConfig(do_sample=False, eos_token_id=NO_EOS, max_new_tokens=None)
        config = ContinuousBatchingConfig(allow_block_sharing=sharing, cpu_offload_space=offload)
        made = engine(model, generation_config=greedy, config=config, **sizes)
        made.start()
        try:
            yield made
        finally:
            made.stop(timeout=60)

    return run


def collect(made: Any, names: Sequence[str]) -> dict[str, Any]:
    """The final outputs of requests by name; fails if the engine dies."""
    found: dict[str, Any] = {}
    while len(found) < len(names):
        output = made.get_result(timeout=1)
        if output is not None and output.is_finished():
            found[output.request_id] = output
        assert output is not None or made.is_running(), "the engine died"
    return found


@pytest.fixture
def results() -> Callable[[Any, Sequence[str]], dict[str, Any]]:
    """`collect`."""
    return collect


@pytest.fixture
def together(running: Callable[..., Any]) -> Answer:
    """The answers to requests that are added at once; all pages must be free after them."""

    def run(model: Any, requests: Requests, **arguments: Any) -> list[list[int]]:
        with running(model, **arguments) as made:
            names = [made.add_request(prompt, max_new_tokens=n) for prompt, n in requests]
            outputs = collect(made, names)
            assert made.free_pages == made.total_pages > 0
        assert [outputs[name].error for name in names] == [None] * len(names)
        return [outputs[name].generated_tokens for name in names]

    return run


@pytest.fixture
def alone(running: Callable[..., Any]) -> Answer:
    """The answers to requests that are added one by one, and share no prefix."""

    def run(model: Any, requests: Requests, **arguments: Any) -> list[list[int]]:
        answers = []
        with running(model, sharing=False, **arguments) as made:
            for prompt, n in requests:
                name = made.add_request(prompt, max_new_tokens=n)
                answers.append(collect(made, [name])[name].generated_tokens)
        return answers

    return run


@pytest.fixture
def some() -> Callable[[int], Requests]:
    """Random requests; most begin with a part of the same 200 tokens."""

    def make(count: int) -> Requests:
        draw = random.Random(count)
        first = [draw.randrange(3, VOCAB) for _ in range(200)]
        requests = []
        for _ in range(count):
            own = [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 120))]
            requests.append((first[: draw.choice((0, 64, 130, 200))] + own, draw.randrange(1, 30)))
        return requests

    return make
