"""No work is done twice: graphs are compiled once, captured once, and forgotten when they must."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import qoqc
from qoqc.decode import replay
from qoqc.decode.inputs import StepInputs
from qoqc.decode.replay import Replayed
from qoqc.decode.steps import Steps
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.testing import VOCAB, tiny_model


def generate(
    model: Any, batch: int, prompt: int, tokens: int, *, padding: int = 0, **more: Any
) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (batch, prompt), generator=torch.Generator().manual_seed(prompt))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    ids, mask = ids.to(model.device), mask.to(model.device)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    out: torch.Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)
    return out.cpu()


WARM_UP = [(1, 10, 5, 0), (1, 12, 5, 3), (2, 10, 5, 0), (2, 10, 5, 2)]
LATER = [
    (1, 300, 5, 0),
    (1, 9, 5, 2),
    (3, 300, 5, 3),
    (1, 25, 9, 0),
    (1, 600, 4, 0),
    (5, 30, 5, 0),
    (4, 11, 7, 2),
    (7, 310, 9, 4),
    (2, 500, 3, 0),
]


def test_no_graph_is_compiled_after_warm_up() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = qoqc.compile(tiny_model("llama", num_hidden_layers=1), glue="eager")
    for batch, prompt, tokens, padding in WARM_UP:
        generate(model, batch, prompt, tokens, padding=padding)
    compiled = counters["stats"]["unique_graphs"]
    # a prefill and a step, for one sequence and for several, padded and not
    assert compiled == 2 * 2 * 2
    for batch, prompt, tokens, padding in LATER:
        generate(model, batch, prompt, tokens, padding=padding)
        assert counters["stats"]["unique_graphs"] == compiled, (batch, prompt, padding)


def test_without_a_pool_nothing_is_captured() -> None:
    calls: list[int] = []
    run = Replayed("test", lambda: calls.append(1), None)
    for _ in range(4):
        run()
    assert len(calls) == 4
    assert not run.captured


class FakeGraph:
    """A capture that counts replays, or fails."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class FakeCapture:
    """torch.cuda.graph on a machine without a GPU."""

    def __init__(self, graph: FakeGraph, **kwargs: Any) -> None:
        assert kwargs["capture_error_mode"] == "thread_local"

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: Any) -> None:
        pass


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> replay.Pool:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return replay.Pool()


def test_first_runs_second_captures_others_replay(fake_cuda: replay.Pool) -> None:
    calls: list[int] = []

    def run() -> int:
        calls.append(1)
        return len(calls)

    replayed = Replayed("test", run, fake_cuda)
    assert [replayed() for _ in range(5)] == [1, 2, 2, 2, 2]
    assert len(calls) == 2
    assert replayed.captured
    graph: Any = replayed._graph
    # the capture runs nothing, so it is replayed at once
    assert graph.replays == 4


def test_what_cannot_be_captured_runs_and_says_so(
    fake_cuda: replay.Pool, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def run() -> int:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return len(calls)

    replayed = Replayed("the step", run, fake_cuda)
    with caplog.at_level("WARNING", replay.log.name):
        assert [replayed() for _ in range(4)] == [1, 3, 4, 5]
    assert not replayed.captured
    assert caplog.messages == [
        "the step cannot be captured and runs without a graph: "
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.gpu
def test_after_a_failed_capture_all_goes_on() -> None:
    state = torch.zeros(4, device="cuda")

    def step() -> torch.Tensor:
        state.add_(torch.rand(4, device="cuda"))
        return state

    def waits() -> float:
        return float(state.sum().item())

    def drawn(pool: replay.Pool | None) -> torch.Tensor:
        torch.manual_seed(5)
        state.zero_()
        run = Replayed("step", step, pool)
        for _ in range(4):
            run()
        assert run.captured == (pool is not None and pool.usable)
        return state.clone()

    expected = drawn(None)
    pool = replay.Pool()
    assert torch.equal(drawn(pool), expected)
    stream = torch.cuda.current_stream()
    failing = Replayed("waits", waits, pool)
    assert [failing() for _ in range(3)] == [float(expected.sum())] * 3
    assert not failing.captured
    assert torch.cuda.current_stream() == stream
    assert torch.equal(drawn(pool), expected)  # abandoned: runs as it is
    assert torch.equal(drawn(replay.Pool()), expected)
    assert torch.equal(drawn(None), expected)


def cache_of(model: Any) -> KV4Cache:
    cache = KV4Cache(model.config, 64)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long), past_key_values=cache)
    return cache


def move_a_weight(model: Any) -> None:
    weight = model.model.norm.weight
    weight.data = weight.data.clone()


def replace_a_weight(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(torch.ones(128), requires_grad=False)


@pytest.mark.parametrize("change", [move_a_weight, replace_a_weight])
def test_steps_are_forgotten_when_a_tensor_of_the_model_moves(
    change: Callable[[Any], None],
) -> None:
    model, steps = tiny_model("llama"), Steps(graphs=False)
    cache = cache_of(model)
    known = steps.of(model, cache)
    assert steps.of(model, cache) is known
    model.model.norm.weight.requires_grad_(False).mul_(2)  # in place: the graph reads it anew
    assert steps.of(model, cache) is known
    change(model)
    assert steps.of(model, cache) is not known


def test_steps_do_not_keep_a_cache() -> None:
    model, steps = tiny_model("llama"), Steps(graphs=False)
    cache = cache_of(model)
    steps.of(model, cache).forward(StepInputs(False, torch.zeros(1, 1), {}))
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_running_the_steps() -> None:
    torch._dynamo.reset()
    plain = qoqc.compile(tiny_model("llama", torch.bfloat16).cuda(), graphs=False)
    model = qoqc.compile(tiny_model("llama", torch.bfloat16).cuda())
    asked: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 30, "temperature": 0.8},
        {"do_sample": True, "top_p": 0.7, "top_k": 0},
        {"eos_token_id": list(range(3, 40)), "min_new_tokens": 4},
    ]
    for batch, prompt, padding in [(1, 12, 0), (3, 20, 5), (1, 12, 0), (2, 300, 0)]:
        for more in asked:
            results = []
            for each in (plain, model, model):
                torch.manual_seed(3)
                results.append(generate(each, batch, prompt, 24, padding=padding, **more))
            assert torch.equal(results[0], results[1]), (batch, more)
            assert torch.equal(results[0], results[2]), (batch, more)
    steps = model.qoqc_steps._by_cache
    assert len(steps) == 3
    assert all(f.captured for s in steps.values() for f in s._forwards.values())
    assert not any(
        f.captured for s in plain.qoqc_steps._by_cache.values() for f in s._forwards.values()
    )


@pytest.mark.gpu
def test_graphs_outlive_a_reset_of_dynamo() -> None:
    torch._dynamo.reset()
    model = qoqc.compile(tiny_model("llama", torch.bfloat16).cuda())
    expected = generate(model, 2, 20, 24)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
    assert torch.equal(generate(model, 2, 20, 24), expected)
    del junk
