"""Requests in one engine: each gets what it gets alone, and gives all its pages back."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import qoqc
from qoqc import backend, pipeline
from qoqc.errors import NotCached, OptionError, Unsupported
from qoqc.serve.engine import engine, install, kv_specs
from qoqc.testing import tiny_model

STORIES = Path(__file__).resolve().parents[2] / "examples/models/llama-stories-4m"

Requests = list[tuple[list[int], int]]
Answer = Callable[..., list[list[int]]]


def generated(model: Any, requests: Requests) -> list[list[int]]:
    """What `model.generate` answers, one request at a time."""
    answers = []
    for prompt, n in requests:
        ids = torch.tensor([prompt])
        arguments = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None}
        answers.append(model.generate(ids, **arguments)[0, len(prompt) :].tolist())
    return answers


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[Any]]:
    """What a method of a class returned, call by call."""

    def record(kind: Any, name: str) -> list[Any]:
        returned: list[Any] = []
        method = getattr(kind, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            returned.append(method(self, *args, **kwargs))
            return returned[-1]

        monkeypatch.setattr(kind, name, call)
        return returned

    return record


def test_generate_batch_answers_as_generate_does(some: Any, host: ModuleType) -> None:
    """With linears in fp32: an ulp in attention stays one, and 8 bits hardly show it."""
    model: Any = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    qoqc.compile(model, glue="eager", prefill_kv="quantized", exclude="*", kv_bits=8)
    requests = [(prompt, 12) for prompt, _ in some(6)]
    wanted = generated(model, requests)
    install(model)
    greedy = GenerationConfig(do_sample=False, eos_token_id=None, max_new_tokens=12)
    found = model.generate_batch([prompt for prompt, _ in requests], generation_config=greedy)
    assert [output.generated_tokens for output in found.values()] == wanted
    # and the model is its own again
    assert generated(model, requests[:1]) == wanted[:1]


def test_answers_in_w4a8kv4_are_the_models_own(stories: Any, some: Any, together: Answer) -> None:
    """Every token is the best for the model without a cache, in most of the answers.

    Not in all: its sums are of another order, and an ulp may turn the rounding of an activation or
    of a 4-bit key, which moves this model's logits by up to 0.7 (in 1 of these answers here).
    """
    requests = [(prompt, 12) for prompt, _ in some(6)]
    answers = together(stories, requests, num_pages=60, max_tokens_per_batch=100)
    best = 0
    for (prompt, _), answer in zip(requests, answers, strict=True):
        with torch.no_grad():
            logits = stories(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        best += logits[len(prompt) - 1 : -1].argmax(1).tolist() == answer
    assert best >= 4


@pytest.mark.parametrize("chunk", [1024, 37])
def test_30_concurrent_requests_get_what_each_gets_alone(
    tiny: Any, some: Any, together: Answer, alone: Answer, chunk: int
) -> None:
    requests = some(30)
    wanted = alone(tiny, requests, num_pages=20)
    assert together(tiny, requests, num_pages=300, max_tokens_per_batch=chunk) == wanted


@pytest.mark.slow
def test_200_concurrent_requests_get_what_each_gets_alone(
    stories: Any, some: Any, together: Answer, alone: Answer
) -> None:
    requests = some(200)
    wanted = alone(stories, requests, num_pages=20)
    assert together(stories, requests, num_pages=150, max_tokens_per_batch=300) == wanted


def test_a_shared_prefix_changes_no_answer(
    tiny: Any, some: Any, together: Answer, calls: Any, host: ModuleType
) -> None:
    requests, matches = some(12), calls(host.KV4PagedCache, "search_prefix_match")
    sizes = {"num_pages": 100, "max_requests": 3}
    shared = together(tiny, requests, sharing=True, **sizes)
    assert max(matches) >= 64
    matches.clear()
    assert together(tiny, requests, sharing=False, **sizes) == shared
    assert not any(matches)


def test_put_off_requests_go_on_as_if_nothing_had_been(
    tiny: Any, some: Any, together: Answer, alone: Answer, calls: Any
) -> None:
    requests, put_off = some(16), calls(OffloadingManager, "offload_requests")
    wanted = alone(tiny, requests, num_pages=20)
    assert together(tiny, requests, num_pages=10, max_tokens_per_batch=64) == wanted
    assert any(put_off)


def test_pages_go_to_the_host_and_come_back(
    tiny: Any,
    some: Any,
    together: Answer,
    alone: Answer,
    calls: Any,
    host: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The manager refuses it without a GPU, for want of pinned memory: here it is not pinned."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)
    )
    requests, moved = some(16), calls(OffloadingManager, "_offload_to_cpu")
    wanted = alone(tiny, requests, num_pages=20)
    with pytest.raises(OptionError, match="cpu_offload_space moves pages from a GPU"):
        together(tiny, requests, num_pages=10, offload=0.01)
    monkeypatch.setattr(host, "OFFLOADING_DEVICES", ("cpu",))
    found = together(tiny, requests, num_pages=10, max_tokens_per_batch=64, offload=0.01)
    assert found == wanted
    assert any(moved)


def test_cancelled_requests_give_their_pages_back(
    tiny: Any, some: Any, running: Any, results: Any
) -> None:
    requests = some(12)
    with running(tiny, num_pages=200) as made:
        names = [made.add_request(p, max_new_tokens=200, streaming=True) for p, _ in requests]
        seen: set[str] = set()
        while len(seen) < 6:  # in the middle of decoding
            output = made.get_result(timeout=1)
            seen |= {output.request_id} if output is not None else set()
        for name in names[::2]:
            made.cancel_request(name)
        finished = results(made, names[1::2])
        assert all(len(finished[name].generated_tokens) == 200 for name in names[1::2])
        for _ in range(100):
            if made.free_pages == made.total_pages:
                break
            time.sleep(0.05)
        assert made.free_pages == made.total_pages


def test_forked_requests_have_pages_of_their_own(tiny: Any, some: Any) -> None:
    prompts = [prompt for prompt, _ in some(3)]
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=40)
    install(tiny)
    single = tiny.generate_batch(prompts, generation_config=greedy)
    greedy.num_return_sequences = 3
    several = tiny.generate_batch(prompts, generation_config=greedy)
    assert len(several) == 9
    for number, output in enumerate(single.values()):
        answers = list(several.values())[3 * number : 3 * number + 3]
        assert [a.generated_tokens for a in answers] == [output.generated_tokens] * 3


def test_a_request_that_cannot_be_served_fails_alone(tiny: Any, running: Any, results: Any) -> None:
    with running(tiny, num_pages=2) as made:
        assert made.request_tokens == 128
        names = [
            made.add_request([5] * 100, max_new_tokens=29),
            made.add_request([], max_new_tokens=2),
            made.add_request([5, 10**6], max_new_tokens=2),
            made.add_request([5] * 100, max_new_tokens=28),
            made.add_request([5] * 120),
        ]
        found = results(made, names)
        errors = [found[name].error for name in names]
        assert "more num_pages" in errors[0]
        assert "empty" in errors[1]
        assert "vocabulary" in errors[2]
        assert errors[3:] == [None, None]
        assert [len(found[name].generated_tokens) for name in names[3:]] == [28, 8]


SLOW_FAMILIES = ("mistral", "gpt_oss", "deepseek_v3", "qwen2")


@pytest.mark.parametrize(
    "family", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)]
)
def test_windows_soft_caps_sinks_and_latents(
    family: str, some: Any, together: Answer, alone: Answer
) -> None:
    bits = [4, 8]
    # with linears in fp32 an ulp stays one, and generate()'s sums are of another order
    options: dict[str, Any] = {"prefill_kv": "quantized", "kv_layers": bits, "exclude": "*"}
    model = qoqc.compile(tiny_model(family), glue="eager", **options)
    requests = [(prompt, 8) for prompt, _ in some(5)]
    assert [spec.bits for spec in kv_specs(model)] == bits
    wanted = alone(model, requests, num_pages=20)
    assert together(model, requests, num_pages=40, max_tokens_per_batch=50) == wanted
    if family != "deepseek_v3":  # generate() caches its latents instead
        assert generated(model, requests) == wanted


def test_what_has_no_pages_is_refused(tiny: Any) -> None:
    with pytest.raises(Unsupported, match=r"qoqc.compile\(model\)"):
        engine(tiny_model("llama"))
    with pytest.raises(Unsupported, match="has its own attention"):
        engine(qoqc.compile(tiny_model("bloom")))
    with pytest.raises(Unsupported, match="layer 1 keeps its keys and values in 16 bit"):
        engine(qoqc.compile(tiny_model("llama"), kv_layers=[4, 16]))
    with pytest.raises(Unsupported, match="mode='reduce-overhead' without graphs=True"):
        engine(qoqc.compile(tiny_model("llama"), mode="reduce-overhead", graphs=False))
    with pytest.raises(ValueError, match="num_pages=-1"):
        engine(tiny, num_pages=-1)
    first = engine(tiny, num_pages=4)
    with pytest.raises(Unsupported, match="in another engine"):
        engine(tiny, num_pages=4)
    with pytest.raises(Unsupported, match="stop the engine"), torch.no_grad():
        tiny(torch.tensor([[5, 6]]))
    first.stop()
    with torch.no_grad():
        assert tiny(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_a_loaded_artifact_answers_as_the_model_it_was_made_from(
    tmp_path: Path, some: Any, together: Answer
) -> None:
    """Its weights are packed only: no step, and nothing before it, reads a 16-bit one."""
    options: dict[str, Any] = {"glue": "eager", "kv_layers": [8, 4]}
    model = qoqc.compile(tiny_model("qwen3"), **options)
    qoqc.save(model, tmp_path / "artifact")
    loaded = qoqc.load(tmp_path / "artifact", glue="eager")
    requests = some(6)
    found = together(loaded, requests, num_pages=60)
    assert found == together(model, requests, num_pages=60)
    assert [spec.bits for spec in kv_specs(loaded)] == [8, 4]


def test_one_graph_serves_all_steps(some: Any, together: Answer) -> None:
    model = qoqc.compile(tiny_model("llama"), glue="eager")
    torch._dynamo.reset()
    pipeline.reports.clear()
    together(model, some(10), num_pages=60, max_tokens_per_batch=100)
    (report,) = pipeline.reports
    assert report.counts["linear"] == 14


@pytest.mark.slow
def test_the_tenth_model_of_a_process_is_compiled_too(together: Answer) -> None:
    """torch's limit for graphs of a function is 8, for each thread anew, and engines have threads:
    beyond it models run uncompiled, and nobody says so."""
    torch._dynamo.reset()
    pipeline.reports.clear()
    for number in range(10):
        sizes = {"intermediate_size": 128 * (number + 1), "num_hidden_layers": 1}
        model = tiny_model("llama", **sizes)
        qoqc.compile(model, glue="eager")
        together(model, [([5, 6, 7], 2)], num_pages=4)
        assert len(pipeline.reports) == number + 1


def test_an_engine_starts_again(tiny: Any, some: Any, running: Any, results: Any) -> None:
    prompt = some(1)[0][0]
    with running(tiny, num_pages=10) as made:
        name = made.add_request(prompt, max_new_tokens=5)
        before = results(made, [name])[name].generated_tokens
        made.stop()
        assert made.total_pages == made.free_pages == 0
        made.start()
        name = made.add_request(prompt, max_new_tokens=5)
        assert results(made, [name])[name].generated_tokens == before
        assert made.free_pages == made.total_pages == 10


def test_what_fails_in_the_warm_up_is_an_error(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers logs it and goes on: to the first request, which would meet it again."""

    def compile_graph(*_: Any) -> None:
        raise NotCached("graph000 was not in the cache")

    torch._dynamo.reset()  # or the code of another such model is met
    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    model = qoqc.compile(tiny_model("llama"), glue="eager", prefill_kv="quantized")
    made = engine(model, num_pages=4)
    with pytest.raises(NotCached, match="graph000 was not in the cache"):
        made.warmup()
    made.stop()
