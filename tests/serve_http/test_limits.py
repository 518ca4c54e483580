"""Keys, bounds and time limits; clients that go away; the end of a server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
import pytest

from qoqc.serve.http import answer, prompts, protocol, wording

LONG: dict[str, Any] = {
    "model": "stories",
    "prompt": "Once",
    "max_tokens": 900,
    "extra_body": {"ignore_eos": True},
}


def test_key_on_every_route_but_health(launch: Any) -> None:
    live = launch(api_key="sesame")
    for path in ("/v1/models", "/metrics", "/v1/models/stories", "/nowhere"):
        for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesame"}):
            reply = live.request("GET", path, **headers)
            assert reply.status == 401, path
            assert reply.error()["code"] == "invalid_api_key"
        assert live.request("GET", path, Authorization="Bearer sesame").status != 401
    assert live.request("POST", "/v1/completions", b"{}").status == 401
    assert live.request("GET", "/health").status == 200
    with pytest.raises(openai.AuthenticationError):
        live.client(api_key="wrong").completions.create(model="stories", prompt="x", max_tokens=1)
    right = live.client(api_key="sesame")
    assert right.completions.create(model="stories", prompt="x", max_tokens=1).choices


def test_body_limit(launch: Any) -> None:
    live = launch(max_body=1000)
    body = json.dumps({"model": "stories", "prompt": "x" * 1000}).encode()
    announced = live.request("POST", "/v1/completions", body, Content_Type="application/json")
    assert announced.status == 413
    assert announced.error()["code"] == "body_too_large"
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b"x" * 512 + b"\r\n" * 1
        )
        connection.sendall(b"200\r\n" + b"x" * 512 + b"\r\n")
        assert b" 413 " in connection.recv(100)
    small = json.dumps({"model": "stories", "prompt": "x", "max_tokens": 1}).encode()
    reply = live.request("POST", "/v1/completions", small, Content_Type="application/json")
    assert reply.status == 200


def test_token_limits(launch: Any) -> None:
    live = launch(max_tokens=5, pages=2)  # 2 pages of 64 tokens
    client = live.client()
    with pytest.raises(openai.BadRequestError, match="at most 5"):
        client.completions.create(model="stories", prompt="x", max_tokens=6)
    answer = client.chat.completions.create(
        model="stories", messages=[{"role": "user", "content": "x"}], temperature=0
    )
    assert answer.usage.completion_tokens == 5
    with pytest.raises(openai.BadRequestError, match="takes 128 tokens") as caught:
        client.completions.create(model="stories", prompt=[7] * 124, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    # the longest request there can be has all pages to itself
    full = client.completions.create(
        model="stories", prompt=[7] * 123, max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert full.usage.completion_tokens == 5
    live.settle()


@pytest.fixture(scope="module")
def narrow(launch: Any) -> Iterator[Any]:
    """A server for two requests at a time."""
    yield launch(max_pending=2)


def test_too_many_requests_are_told_when_to_come_back(narrow: Any) -> None:
    client = narrow.client()
    streams = [client.completions.create(**LONG, stream=True) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="2 requests are open") as caught:
        client.completions.create(model="stories", prompt="x", max_tokens=1)
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert caught.value.type == "rate_limit_error"
    for stream in streams:
        stream.close()
    narrow.settle()
    assert client.completions.create(model="stories", prompt="x", max_tokens=1).choices


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_frees_its_place(narrow: Any, stream: bool) -> None:
    before, tokens = cancelled(narrow), generated(narrow)
    host, port = narrow.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "extra_body": None, "ignore_eos": True, "stream": stream})
    body = body.replace('"extra_body": null, ', "")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        if stream:
            assert b" 200 " in connection.recv(100)
        else:
            wait_until(lambda: has_tokens(narrow, 3))
    narrow.settle()
    assert cancelled(narrow) == before + 1
    assert generated(narrow) >= tokens + (1 if stream else 3)


def test_timeout_cancels_the_request(launch: Any) -> None:
    live = launch(timeout=0.3)
    client = live.client()
    with pytest.raises(openai.APIStatusError, match="more than 0.3 s") as caught:
        client.completions.create(**LONG)
    assert caught.value.status_code == 504
    live.settle()
    # a stream that has begun cannot change its status: the error is its last event
    with pytest.raises(openai.APIError, match="more than 0.3 s"):
        for _ in client.completions.create(**LONG, stream=True):
            pass
    live.settle()
    assert client.completions.create(model="stories", prompt="x", max_tokens=1).choices


def test_client_that_does_not_read_loses_its_place(
    launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = launch(timeout=0.2).service
    monkeypatch.setattr(answer, "READING", 0.2)
    request = protocol.CompletionRequest(model="stories", prompt="Once", max_tokens=3, stream=True)
    make = partial(prompts.completion_job, request)
    sent = []

    async def call() -> None:
        full = asyncio.Event()

        async def send(message: Any) -> None:
            sent.append(message)
            await full.wait()  # a socket whose buffers are full, and stay it

        stalled = answer.Answer(
            service, "completions", make, wording.Wording("stories", False), True
        )
        await stalled({"type": "http"}, full.wait, send)

    start = time.monotonic()
    asyncio.run(call())
    assert time.monotonic() - start < 10
    assert len(sent) == 1 and service.open_requests == 0


def test_body_that_does_not_arrive(launch: Any) -> None:
    live = launch(timeout=0.3)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(100)


def test_greedy_server_refuses_temperatures(launch: Any) -> None:
    client = launch(greedy=True).client()
    with pytest.raises(openai.BadRequestError, match="--greedy"):
        client.completions.create(model="stories", prompt="x", temperature=0.5)
    texts = {
        client.completions.create(model="stories", prompt="Once upon", **more).choices[0].text
        for more in ({}, {"temperature": 0})
    }
    assert len(texts) == 1  # the model's own default, a temperature of 0.7, does not apply


def test_shutdown_lets_open_requests_finish(launch: Any) -> None:
    live = launch(grace=30)
    chunks = iter(live.client().completions.create(**{**LONG, "max_tokens": 150}, stream=True))
    first = next(chunks)
    stopping = threading.Thread(target=live.stop)
    stopping.start()
    rest = list(chunks)
    assert first.choices[0].text
    assert rest[-1].choices[0].finish_reason == "length"
    stopping.join(30)
    assert not live.service.driver.alive
    with pytest.raises(openai.APIConnectionError):
        live.client().models.list()


def test_shutdown_cuts_off_what_takes_too_long(launch: Any) -> None:
    live = launch(grace=1)
    chunks = iter(live.client().completions.create(**LONG, stream=True))
    next(chunks)
    start = time.monotonic()
    live.stop()
    assert time.monotonic() - start < 8
    with pytest.raises(openai.APIError, match="shut down before the answer was complete"):
        for chunk in chunks:
            assert chunk.choices[0].finish_reason is None
    assert not live.service.driver.alive


def test_dead_engine_is_503_and_unhealthy(launch: Any) -> None:
    live = launch()
    broken = live.service.driver._manager

    def explode(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("a kernel failed")

    broken.batch_processor.model_runner.compute_batch = explode
    client = live.client()
    with pytest.raises(openai.InternalServerError, match="a kernel failed"):
        client.completions.create(model="stories", prompt="x")
    wait_until(lambda: live.request("GET", "/health").status == 503)
    with pytest.raises(openai.InternalServerError, match="must be restarted") as caught:
        client.completions.create(model="stories", prompt="x")
    assert caught.value.status_code == 503


def cancelled(live: Any) -> float:
    """The count of requests that ended because the client left."""
    return metric(live, 'qoqc_requests_total{outcome="cancelled",route="completions"} ')


def generated(live: Any) -> float:
    """The count of tokens generated."""
    return metric(live, "qoqc_generated_tokens_total ")


def has_tokens(live: Any, count: int) -> bool:
    """Whether the newest request is the engine's, and has so many tokens."""
    driver = live.service.driver
    output = driver.so_far(f"serve-{driver._numbers}")
    return output is not None and len(output.generated_tokens) >= count


def metric(live: Any, name: str) -> float:
    """A figure of /metrics, by the beginning of its line; 0 if it is not there."""
    text = live.request("GET", "/metrics").body.decode()
    found = [line for line in text.splitlines() if line.startswith(name)]
    return float(found[0].split()[-1]) if found else 0.0


def wait_until(holds: Any) -> None:
    """Wait for a condition, at most 20 s."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
