"""The decode loop gives token for token what transformers' own loop gives on the same model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import qoqc
from qoqc.decode import loop
from qoqc.errors import CacheFull
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.testing import tiny_model

TEXTS = ("Once upon a time there was a", "The dog", "One day, a little girl named Lily found")


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    torch._dynamo.reset()
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    # two layers: what is tested is the loop around them
    loaded.model.layers = loaded.model.layers[:2]
    loaded.config.num_hidden_layers = 2
    return qoqc.compile(loaded.eval(), glue="eager")


@pytest.fixture
def asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which loop served: "ours" or "theirs"; `asked.append("theirs")` refuses the next ones."""
    served: list[str] = []
    ours = loop.generate

    def generate(*args: Any) -> Any:
        served.append("ours")
        return ours(*args)

    monkeypatch.setattr(loop, "generate", generate)
    return served


def both(model: Any, monkeypatch: pytest.MonkeyPatch, asked: list[str], **kwargs: Any) -> Any:
    """The same call through our loop and through transformers'."""
    seed = 7
    torch.manual_seed(seed)
    got = model.generate(**kwargs)
    assert asked == ["ours"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "refusal", lambda *_: "for comparison")
        torch.manual_seed(seed)
        expected = model.generate(**kwargs)
    assert asked == ["ours"]
    return got, expected


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "min_new_tokens": {"do_sample": False, "min_new_tokens": 30, "eos_token_id": [2, 13, 14]},
    "eos at different times": {"do_sample": False, "eos_token_id": [2, 13, 14, 281, 284]},
    "no eos": {"do_sample": False, "eos_token_id": None},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "temperature": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top_k": {"do_sample": True, "top_k": 20},
    "top_p": {"do_sample": True, "top_p": 0.8, "top_k": 0, "temperature": 1.2},
    "min_p": {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.1},
    "no_repeat_ngram_size": {"do_sample": False, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "left-padded batch"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
def test_equal_tokens(
    model: Any,
    tokenizer: Any,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    texts: tuple[str, ...],
    setting: dict[str, Any],
) -> None:
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
    got, expected = both(model, monkeypatch, asked, **inputs, max_new_tokens=40, **setting)
    assert torch.equal(got, expected)
    assert got.shape[1] > inputs["input_ids"].shape[1] + 1


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_the_prompt_and_each_token(
    model: Any, tokenizer: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    streamers = [Collector(), Collector()]
    order = iter(streamers)
    generate = model.generate

    def streamed(**kwargs: Any) -> Any:
        return generate(**kwargs, streamer=next(order))

    monkeypatch.setattr(model, "generate", streamed)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [13, 14]}
    got, _ = both(model, monkeypatch, asked, **inputs, **options)
    assert streamers[0].values == streamers[1].values
    assert [streamer.ended for streamer in streamers] == [1, 1]
    assert len(streamers[0].values) == 1 + got.shape[1] - inputs["input_ids"].shape[1]


def test_stop_strings(
    model: Any, tokenizer: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    free = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    asked.clear()
    # a word of each row's own, so that all rows stop, at different times
    length = inputs["input_ids"].shape[1]
    words = [tokenizer.decode(row[length + 3 + n]).strip() for n, row in enumerate(free)]
    more = {"stop_strings": words, "tokenizer": tokenizer, "do_sample": False}
    got, expected = both(model, monkeypatch, asked, **inputs, max_new_tokens=60, **more)
    assert torch.equal(got, expected)
    assert got.shape[1] <= length + 7


class Bar(LogitsProcessor):
    """A user's own processor: bars a token, in place."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, input_ids[:, -1] % scores.shape[1]] = -torch.inf
        return scores


class After(StoppingCriteria):
    """A user's own criterion, which counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return torch.full((input_ids.shape[0],), self.calls % 9 == 0)


def test_custom_processor_and_criterion(
    model: Any, tokenizer: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    more = {"logits_processor": [Bar()], "stopping_criteria": [After()], "do_sample": False}
    got, expected = both(model, monkeypatch, asked, **inputs, max_new_tokens=30, **more)
    assert torch.equal(got, expected)
    assert got.shape[1] == inputs["input_ids"].shape[1] + 9


def test_scores_and_cache_are_returned(
    model: Any, tokenizer: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    more = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.2,
        "do_sample": False,
    }
    got, expected = both(model, monkeypatch, asked, **inputs, max_new_tokens=12, **more)
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert torch.equal(torch.stack(got[name]), torch.stack(expected[name])), name
    assert int(got.past_key_values.get_seq_length()) == got.sequences.shape[1] - 1


def test_a_conversation_goes_on_in_its_cache(
    model: Any, tokenizer: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second turn only feeds what is new."""
    first = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    turns = []
    for ours in (True, False):
        cache = KV4Cache(model.config, 128)
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(loop, "refusal", lambda *_: "for comparison")
            options: dict[str, Any] = {"past_key_values": cache, "do_sample": False}
            said = model.generate(first, max_new_tokens=8, attention_mask=first != -1, **options)
            more = torch.cat([said, first], dim=1)
            said = model.generate(more, max_new_tokens=8, attention_mask=more != -1, **options)
        turns.append((said.tolist(), int(cache.get_seq_length())))
    assert turns[0] == turns[1]
    assert asked == ["ours", "ours"]


def test_a_full_cache_is_an_error(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    cache = KV4Cache(model.config, 64)
    with pytest.raises(CacheFull, match="holds 64 tokens, token 65"):
        model.generate(
            **inputs, past_key_values=cache, max_new_tokens=100, do_sample=False, eos_token_id=None
        )


def test_a_prompt_longer_than_the_cache_is_an_error(model: Any) -> None:
    ids = torch.ones(1, 70, dtype=torch.long)
    with pytest.raises(CacheFull, match="holds 64 tokens, token 70"):
        model.generate(ids, past_key_values=KV4Cache(model.config, 64), max_new_tokens=4)


def test_in_and_out_of_inference_mode(model: Any) -> None:
    """What a generation leaves behind serves the next one in either mode."""
    ids = torch.arange(3, 30)[None].repeat(5, 1)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        first = model.generate(ids, attention_mask=ids > 0, **options)
    second = model.generate(ids, attention_mask=ids > 0, **options)
    with torch.inference_mode():
        third = model.generate(ids, attention_mask=ids > 0, **options)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_beam_search_is_transformers_own(model: Any, tokenizer: Any, asked: list[str]) -> None:
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    model.generate(**inputs, num_beams=2, max_new_tokens=4)
    assert asked == []


def test_what_the_loop_cannot_do_is_logged(
    model: Any, tokenizer: Any, asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    with caplog.at_level(logging.INFO, loop.log.name):
        model.generate(**inputs, max_new_tokens=3, use_cache=False)
    assert asked == []
    assert "transformers' own loop generates: the cache is not a KV4Cache" in caplog.text


def test_the_class_keeps_its_name_and_kind(model: Any) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__mro__[1].__name__ == "LlamaForCausalLM"
    kind = type(model)
    loop.install(model, graphs=False)
    assert type(model) is kind


@pytest.mark.parametrize("graphs", [True, False])
def test_inductors_own_graphs_make_way(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture cannot hold another: the forward is compiled without, unless asked otherwise."""
    model, seen = tiny_model("llama"), {}
    monkeypatch.setattr(type(model), "compile", lambda self, **kwargs: seen.update(kwargs))
    qoqc.compile(model, mode="reduce-overhead", graphs=graphs)
    assert seen["options"]["mode"] == ("default" if graphs else "reduce-overhead")
    assert model.qoqc_options.mode == "reduce-overhead"
    assert model.qoqc_steps._graphs == graphs
