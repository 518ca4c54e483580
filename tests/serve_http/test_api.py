"""The routes by OpenAI's own client: answers equal generate()'s, whole and streamed."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch

from qoqc.serve.http import service

PROMPT = "Once upon a time, there was a little dog"


def generated(bundled: tuple[Any, Any], prompt: list[int], tokens: int) -> list[int]:
    """Greedy tokens by transformers' generate."""
    model, _ = bundled
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return [int(token) for token in out[0, len(prompt) :]]


def test_completion_equals_generate(live: Any, bundled: tuple[Any, Any]) -> None:
    tokenizer = bundled[1]
    ids = tokenizer(PROMPT)["input_ids"]
    wanted = generated(bundled, ids, 40)
    answer = live.client().completions.create(
        model="stories", prompt=PROMPT, max_tokens=40, temperature=0
    )
    (choice,) = answer.choices
    assert choice.text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == len(ids) + 40
    assert answer.object == "text_completion" and answer.model == "stories"


def test_token_prompt_is_the_text_prompt(live: Any, bundled: tuple[Any, Any]) -> None:
    client, ids = live.client(), bundled[1](PROMPT)["input_ids"]
    texts = [
        client.completions.create(model="stories", prompt=prompt, temperature=0).choices[0].text
        for prompt in (PROMPT, ids, [PROMPT], [ids])
    ]
    assert len(set(texts)) == 1 and texts[0]


def test_stream_joins_to_the_whole_and_has_usage(live: Any) -> None:
    client = live.client()
    asked = {"model": "stories", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + [
        "length"
    ]
    assert len(pieces) > 5
    assert all(chunk.usage is None for chunk in pieces)
    assert last.choices == [] and last.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(client.completions.create(**asked, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in without)


def test_busy_server_puts_more_tokens_into_a_piece(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = live.client()
    asked = {"model": "stories", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    monkeypatch.setattr(service, "PIECE_SECONDS", 0.2)  # as with two thousand open requests
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == whole
    assert 1 < len(pieces) < 30


def test_chat_ends_at_the_end_of_text(live: Any, bundled: tuple[Any, Any]) -> None:
    client, tokenizer = live.client(), bundled[1]
    messages = [{"role": "user", "content": "Tell me a story about a dog."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    wanted = generated(bundled, ids["input_ids"], 400)
    assert wanted[-1] == bundled[0].config.eos_token_id  # else this test shows nothing
    asked = {"model": "stories", "messages": messages, "max_completion_tokens": 400}
    answer = client.chat.completions.create(**asked, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == tokenizer.decode(wanted, skip_special_tokens=True)
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == len(wanted)
    chunks = list(client.chat.completions.create(**asked, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert joined == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_ignore_eos_goes_on_after_it(live: Any) -> None:
    messages = [{"role": "user", "content": "Tell me a story about a dog."}]
    answer = live.client().chat.completions.create(
        model="stories",
        messages=messages,
        max_tokens=400,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage.completion_tokens == 400
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_text_before_it(live: Any, stream: bool) -> None:
    client = live.client()
    asked = {"model": "stories", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[30:37]  # across tokens, wherever they are split
    if stream:
        chunks = list(client.completions.create(**asked, stop=["never there", stop], stream=True))
        shown = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(**asked, stop=stop).choices[0]
        shown, reason = choice.text, choice.finish_reason
    assert shown == text[: text.index(stop)]
    assert reason == "stop"
    live.settle()


def test_seeds_repeat_and_differ(live: Any) -> None:
    client = live.client()

    def text(**more: Any) -> str:
        asked = {"model": "stories", "prompt": PROMPT, "max_tokens": 40, **more}
        return str(client.completions.create(**asked).choices[0].text)

    warm = {"temperature": 1.0, "top_p": 0.9}
    assert text(seed=1, **warm) == text(seed=1, **warm)
    assert text(seed=1, **warm) != text(seed=2, **warm)
    assert text(**warm) != text(**warm)
    # a nucleus of one token is greedy
    assert text(temperature=1.0, top_p=1e-6, seed=5) == text(temperature=0)


def test_models_health_and_metrics(live: Any) -> None:
    client = live.client()
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").owned_by == "qoqc"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("other/model")
    live.settle()
    before = metrics(live)
    client.completions.create(model="stories", prompt=PROMPT, max_tokens=7, temperature=0)
    after = metrics(live)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("qoqc_generated_tokens_total") == 7
    assert grown("qoqc_prompt_tokens_total") > 5
    assert grown('qoqc_requests_total{outcome="ok",route="completions"}') == 1
    assert grown("qoqc_time_to_first_token_seconds_count") == 1
    assert grown("qoqc_inter_token_seconds_count") == 6
    assert after["qoqc_kv_pages_total"] == after["qoqc_kv_pages_free"] > 0
    assert after["qoqc_open_requests"] == 0


def metrics(live: Any) -> dict[str, float]:
    """The samples of /metrics by name and labels."""
    text = live.request("GET", "/metrics").body.decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}
