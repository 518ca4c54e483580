"""Loads: what a seed makes, how they are driven, and the figures of known times."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from qoqc.bench.serve_load import Answered, drive, measure, summarize
from qoqc.bench.serve_plan import FIRST_ID, Goals, Request, ServePlan
from qoqc.errors import OptionError, Unsupported
from qoqc.serve.http.plain import plain_engine
from qoqc.testing import VOCAB, tiny_model

GOALS = Goals(first=1.0, between=0.1)
BURST = ServePlan(
    requests=8, rate=None, prompt=20, gen=5, spread=0.0, seed=0, warm_up=2, goals=GOALS
)


def plan(**changes: Any) -> ServePlan:
    return dataclasses.replace(BURST, **changes)


def test_burst_is_all_at_once_and_all_the_same() -> None:
    requests = BURST.make(VOCAB, 512)
    assert [(r.arrival, len(r.prompt), r.gen) for r in requests] == [(0.0, 20, 5)] * 8
    tokens = {token for request in requests for token in request.prompt}
    assert min(tokens) >= FIRST_ID and max(tokens) < VOCAB
    assert len({tuple(request.prompt) for request in requests}) == 8
    assert requests == BURST.make(VOCAB, 512)
    assert requests != plan(seed=1).make(VOCAB, 512)


def test_poisson_arrivals_and_log_normal_lengths() -> None:
    count, rate, spread = 4000, 50.0, 0.7
    requests = plan(requests=count, rate=rate, prompt=200, gen=30, spread=spread).make(VOCAB, None)
    gaps = np.diff([0.0, *(request.arrival for request in requests)])
    # exponential: mean and deviation are both 1 / rate; five standard errors of the mean
    assert abs(gaps.mean() - 1 / rate) < 5 / rate / math.sqrt(count)
    assert abs(gaps.std() - 1 / rate) < 0.1 / rate
    logs = np.log([len(request.prompt) for request in requests])
    assert abs(logs.mean() - math.log(200)) < 5 * spread / math.sqrt(count)
    assert abs(logs.std() - spread) < 0.05
    answers = np.log([request.gen for request in requests])
    assert abs(np.corrcoef(logs, answers)[0, 1]) < 0.08


def test_lengths_fit_the_model() -> None:
    requests = plan(requests=500, prompt=100, gen=20, spread=1.5).make(VOCAB, 128)
    sizes = [(len(request.prompt), request.gen) for request in requests]
    assert all(prompt + gen <= 128 and min(prompt, gen) >= 1 for prompt, gen in sizes)
    assert any(prompt == 127 for prompt, _ in sizes)
    with pytest.raises(OptionError, match="25 tokens are asked for, the model takes 24"):
        BURST.make(VOCAB, 24)


def test_warm_up_has_other_prompts() -> None:
    warm = BURST.make_warm_up(VOCAB, 512)
    assert [len(request.prompt) for request in warm] == [20, 20]
    assert not {tuple(r.prompt) for r in warm} & {tuple(r.prompt) for r in BURST.make(VOCAB, 512)}


@pytest.mark.parametrize(
    "changes", [{"rate": 0.0}, {"rate": math.inf}, {"spread": -1.0}, {"goals": Goals(0.0, 1.0)}]
)
def test_bad_plans(changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        plan(**changes)


def test_figures_of_known_times() -> None:
    fine = Answered(0.0, prompt=10, tokens=3, timed=3, times=(0.5, 0.6, 0.7))
    late = Answered(1.0, prompt=10, tokens=3, timed=3, times=(3.0, 3.05, 3.1))
    slow = Answered(2.0, prompt=10, tokens=3, timed=3, times=(2.5, 3.0, 4.0))
    restarted = Answered(3.0, prompt=10, tokens=9, timed=1, times=(3.9,))
    failed = Answered(0.0, prompt=10, tokens=0, timed=0, times=(), error="boom")
    load = summarize("x", [fine, late, slow, restarted, failed], GOALS, over_http=False)
    assert (load.requests, load.failed, load.errors) == (5, 1, {"boom": 1})
    assert (load.seconds, load.generated_tokens, load.prompt_tokens) == (4.0, 18, 40)
    assert load.tok_s == 4.5
    # first tokens took 0.5, 2, 0.5 and 0.9 s
    assert load.first_ms[0] == pytest.approx(700)
    assert load.between_ms[0] == pytest.approx(100)
    assert load.whole_ms[0] == pytest.approx(np.percentile([0.7, 2.1, 2.0, 0.9], 50) * 1e3)
    assert load.goodput == 2 / 4 and load.good_share == 2 / 5
    assert load.restarted == 1
    assert summarize("x", [fine], GOALS, over_http=True).restarted is None
    nothing = summarize("x", [failed], GOALS, over_http=False)
    assert (nothing.tok_s, nothing.first_ms, nothing.goodput) == (0.0, (), 0.0)


class Scripted:
    """A manager that answers at once, and dies at a prompt it was told to."""

    def __init__(self, *, deadly: list[int] | None = None, short: bool = False) -> None:
        self.background_thread_status = SimpleNamespace(fatal_error=None)
        self.alive = True
        self.added: list[float] = []
        self._outputs: collections.deque[Any] = collections.deque()
        self._deadly = deadly
        self._short = short

    def is_running(self) -> bool:
        return self.alive

    def add_request(self, prompt: list[int], **options: Any) -> str | None:
        if not self.alive:
            return None
        name, now = f"r{len(self.added)}", time.perf_counter()
        self.added.append(now)
        if prompt == self._deadly:
            self.alive = False
            self.background_thread_status.fatal_error = RuntimeError("out of pages")
            return name
        assert options["eos_token_id"] == -1 and options["record_timestamps"]
        count = options["max_new_tokens"] - self._short
        self._outputs.append(
            SimpleNamespace(
                request_id=name,
                generated_tokens=[5] * count,
                timestamps=[now] * count,
                error=None,
                is_finished=lambda: True,
            )
        )
        return name

    def get_result(self, timeout: float) -> Any:
        if self._outputs:
            return self._outputs.popleft()
        time.sleep(timeout)
        return None


def test_requests_are_sent_when_they_are_due() -> None:
    manager = Scripted()
    requests = [Request(arrival, [7], 2) for arrival in (0.0, 0.1, 0.1, 0.25)]
    start = time.perf_counter()
    answered = drive(manager, requests)
    sent = [moment - start for moment in manager.added]
    assert len(answered) == 4 and all(one.error is None for one in answered)
    assert all(at >= request.arrival for at, request in zip(sent, requests, strict=True))
    assert sent[-1] < 5


def test_what_a_dead_engine_leaves_behind_has_failed() -> None:
    manager = Scripted(deadly=[9])
    requests = [Request(at, prompt, 2) for at, prompt in ((0.0, [7]), (0.0, [9]), (60.0, [8]))]
    answered = drive(manager, requests)
    assert [one.error for one in answered] == [None] + ["the engine died: out of pages"] * 2


def test_too_few_tokens_are_a_failure() -> None:
    (one,) = drive(Scripted(short=True), [Request(0.0, [7], 3)])
    assert one.error == "2 tokens came, 3 were asked for"


def test_load_on_an_engine() -> None:
    model = tiny_model("llama").eval()
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = plain_engine(model, config, num_pages=16, max_tokens_per_batch=64, page_tokens=32)
    requests = plan(rate=100.0, spread=0.3).make(VOCAB, 512)
    said: list[str] = []
    load = measure("tiny", manager, BURST.make_warm_up(VOCAB, 512), requests, GOALS, said.append)
    assert said == ["tiny: warming up", "tiny: 8 requests"]
    assert (load.requests, load.failed, load.restarted) == (8, 0, 0)
    assert load.generated_tokens == sum(request.gen for request in requests)
    assert load.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert all(one.first > 0 and len(one.times) == one.tokens for one in load.answered)
    assert not manager.is_running()


def test_engine_that_does_not_survive_the_warm_up() -> None:
    class Dying(Scripted):
        model = SimpleNamespace(device=torch.device("cpu"))

        def warmup(self) -> None:
            pass

        def start(self) -> None:
            pass

    manager = Dying(deadly=[9])
    with pytest.raises(Unsupported, match="the warm-up failed: the engine died: out of pages"):
        measure("x", manager, [Request(0.0, [9], 2)], [], GOALS, lambda _: None)
