"""What /metrics shows, in Prometheus' text format: a registry per server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from qoqc.serve.http.driver import Pages

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The figures of one server."""

    def __init__(self, open_requests: Callable[[], int], pages: Callable[[], Pages]) -> None:
        """The arguments are asked for when the figures are read."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "qoqc_requests", "Answered requests", ("route", "outcome"), registry=registry
        )
        self._prompt = Counter("qoqc_prompt_tokens", "Tokens of prompts", registry=registry)
        self._generated = Counter("qoqc_generated_tokens", "Tokens generated", registry=registry)
        self._first = Histogram(
            "qoqc_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self._between = Histogram(
            "qoqc_inter_token_seconds", "Between tokens", buckets=STEPS, registry=registry
        )
        self._whole = Histogram(
            "qoqc_request_seconds", "A whole request", buckets=SECONDS, registry=registry
        )
        gauges: dict[tuple[str, str], Callable[[], int]] = {
            ("qoqc_open_requests", "Requests accepted and not answered"): open_requests,
            ("qoqc_kv_pages_free", "Pages of the KV cache in no use"): lambda: pages().free,
            ("qoqc_kv_pages_total", "Pages of the KV cache"): lambda: pages().total,
        }
        for (name, text), read in gauges.items():
            Gauge(name, text, registry=registry).set_function(read)

    def answered(self, route: str, outcome: str) -> None:
        """A request ended: outcome is `ok`, `cancelled`, or an error's status."""
        self._requests.labels(route, outcome).inc()

    def generated(
        self, prompt: int, count: int, start: float, times: Sequence[float], end: float
    ) -> None:
        """Tokens of one request; `times` are when they came, all in time.perf_counter seconds."""
        self._prompt.inc(prompt)
        self._generated.inc(count)
        self._whole.observe(end - start)
        if times:
            self._first.observe(times[0] - start)
        for before, after in itertools.pairwise(times):
            self._between.observe(after - before)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self._registry)
