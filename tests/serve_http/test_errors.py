"""Bad requests: each has a 4xx that says what is wrong, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

GOOD: dict[str, Any] = {"model": "stories", "prompt": "Once", "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [""]}, "prompt", "empty"),
        ({"prompt": ["one", "two"]}, "prompt", "2 prompts"),
        ({"prompt": [1, 4096]}, "prompt", "4096"),
        ({"prompt": [-1]}, "prompt", "-1"),
        ({"prompt": 5}, "prompt", "prompt"),
        ({"prompt": [1, True]}, "prompt", "prompt"),
        ({"prompt": "a \ud800"}, None, "surrogate"),
        ({"prompt": [5] * 1024}, None, "1024 tokens"),
        ({"prompt": [5] * 1000, "max_tokens": 25}, None, "max_tokens is 25"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2.5}, "max_tokens", "integer"),
        ({"max_tokens": "2"}, "max_tokens", "integer"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature", "temperature"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"n": 2}, "n", "not supported"),
        ({"n": True}, "n", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"logprobs": 0}, "logprobs", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "not a parameter"),
        ({"model": 3}, "model", "string"),
    ],
)
def test_bad_completion(live: Any, change: dict[str, Any], param: str | None, says: str) -> None:
    reply = post(live, "/v1/completions", json.dumps({**GOOD, **change}).encode())
    error = reply.error()
    assert reply.status == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]


def test_neutral_fields_are_taken(live: Any) -> None:
    neutral = {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "frequency_penalty": 0.0}
    more = {"presence_penalty": 0, "logit_bias": {}, "user": "someone", "suffix": None}
    body = json.dumps({**GOOD, **neutral, **more}).encode()
    assert post(live, "/v1/completions", body).status == 200


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"prompt": "x"}, "not a parameter"),
    ],
)
def test_bad_chat(live: Any, change: dict[str, Any], says: str) -> None:
    good = {"model": "stories", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    reply = post(live, "/v1/chat/completions", json.dumps({**good, **change}).encode())
    assert reply.status == 400
    assert says in reply.error()["message"]


def test_parts_of_a_message_are_its_text(live: Any) -> None:
    client = live.client()
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]
    texts = [
        client.chat.completions.create(
            model="stories",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=8,
        )
        .choices[0]
        .message.content
        for content in ("Tell me a story.", parts)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b'{"model"', b"\xff", b"[" * 100_000])
def test_body_that_is_no_json_object(live: Any, body: bytes) -> None:
    reply = post(live, "/v1/completions", body)
    assert reply.status == 400
    assert reply.error()["code"] == "invalid_json"


def test_other_content_types_are_refused(live: Any) -> None:
    body = json.dumps(GOOD).encode()
    reply = live.request("POST", "/v1/completions", body, Content_Type="text/plain")
    assert reply.status == 415
    assert "application/json" in reply.error()["message"]


def test_unknown_model_paths_and_methods(live: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here") as caught:
        live.client().completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"
    unknown = live.request("GET", "/v2/models")
    assert unknown.status == 404 and unknown.error()["type"] == "not_found_error"
    wrong = live.request("GET", "/v1/completions")
    assert wrong.status == 405 and "POST" in wrong.headers["allow"]
    assert live.request("GET", "/docs").status == 404


def post(live: Any, path: str, body: bytes) -> Any:
    """A JSON request."""
    return live.request("POST", path, body, Content_Type="application/json")
