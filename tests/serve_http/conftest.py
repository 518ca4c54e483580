"""Servers in threads of the tests' process: the bundled model, on transformers' own engine."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qoqc.serve.http.plain import plain_engine

FOR_ALL = ("test_sampling.py", "test_text.py")
"""Tests that run without the packages of the extras serve and bench."""

try:
    import uvicorn
    from openai import OpenAI

    from qoqc.serve.http.driver import Driver
    from qoqc.serve.http.lifecycle import address_of, bind, make_server
    from qoqc.serve.http.service import Service
    from qoqc.serve.http.settings import Settings
except ModuleNotFoundError as error:
    if (error.name or "").startswith("qoqc"):
        raise
    warnings.warn(f"no server is tested here: {error}; pip install 'qoqc[dev]'", stacklevel=1)
    tests = Path(__file__).parent.glob("test_*.py")
    collect_ignore = [path.name for path in tests if path.name not in FOR_ALL]

BUNDLED = Path(__file__).parents[2] / "examples" / "models" / "llama-stories-4m"

PAGE_TOKENS = 64
PAGES = 512


@dataclasses.dataclass
class Reply:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def error(self) -> dict[str, Any]:
        """The error object of the body; KeyError if it has none."""
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


@dataclasses.dataclass
class Live:
    """A server that runs in a thread."""

    url: str
    service: Service
    server: uvicorn.Server
    thread: threading.Thread

    def client(self, **options: Any) -> OpenAI:
        """OpenAI's client for it; no retries, so that tests see the first answer."""
        options = {"api_key": "none", "max_retries": 0, "timeout": 60.0, **options}
        return OpenAI(base_url=f"{self.url}/v1", **options)

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Reply:
        """A request as it is; `_` in names of headers stands for `-`."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body or None, named)
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def settle(self) -> None:
        """Wait until no request is open and all pages are free, at most 20 s."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            pages = self.service.driver.pages()
            if self.service.open_requests == 0 and pages.free == pages.total:
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.service.open_requests} requests are open, pages: {pages}")

    def stop(self) -> None:
        """End it as SIGTERM would; the thread is gone afterwards."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


Launch = Callable[..., Live]


@pytest.fixture(scope="session")
def bundled() -> tuple[Any, Any]:
    """The bundled model, which nobody serves, and its tokenizer."""
    return read_model(), AutoTokenizer.from_pretrained(BUNDLED)


def read_model() -> Any:
    """The bundled model in fp32, the fastest on CPUs. Engines change a model: one for each."""
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def launch(bundled: tuple[Any, Any]) -> Iterator[Launch]:
    """launch(pages=..., greedy=..., **settings) starts a server; they all end with the tests."""
    tokenizer = bundled[1]
    started: list[Live] = []

    def start(*, pages: int = PAGES, greedy: bool = False, **settings: Any) -> Live:
        model = read_model()
        config = GenerationConfig(do_sample=False, eos_token_id=model.config.eos_token_id)
        engine = plain_engine(
            model, config, num_pages=pages, max_tokens_per_batch=256, page_tokens=PAGE_TOKENS
        )
        driver = Driver(engine, greedy=greedy)
        driver.start()
        service = Service(
            driver, model, tokenizer, Settings(**{"model_name": "stories", "grace": 5, **settings})
        )
        bound = bind("127.0.0.1", 0)
        server = make_server(service)
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        live = Live(address_of(bound), service, server, thread)
        started.append(live)
        return live

    yield start
    for live in started:
        live.stop()


@pytest.fixture(scope="session")
def live(launch: Launch) -> Live:
    """One server for the tests that need no settings of their own."""
    return launch()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """free_port() is a port that nobody listens on now."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find
