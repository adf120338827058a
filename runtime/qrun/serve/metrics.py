"""Prometheus metrics of the server: what is asked, how long it takes, what is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qrun.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server; each server has a registry of its own.

    Args:
        engines: by the names of their models.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "qrun_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self._tokens = Counter("qrun_tokens", "Tokens by kind.", ["model", "kind"], registry=self._registry)
        self._first = Histogram(
            "qrun_first_token_seconds",
            "From a request to the first text of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._between = Histogram(
            "qrun_between_tokens_seconds",
            "Mean time between two tokens of an answer.",
            ["model"],
            buckets=tuple(each / 10 for each in _SECONDS),
            registry=self._registry,
        )
        self._registry.register(_InUse(engines))

    def request(self, route: str, status: int, facts: Mapping[str, Any]) -> None:
        """One request has ended; ``facts`` are those of its log line."""
        self._requests.labels(route, str(status)).inc()
        model = facts.get("model")
        if model is None or "completion_tokens" not in facts:
            return
        for kind in ("prompt", "cached", "completion"):
            self._tokens.labels(model, kind).inc(facts[f"{kind}_tokens"])
        if (first := facts.get("first_ms")) is not None:
            self._first.labels(model).observe(first / 1000)
        if (between := facts.get("between_ms")) is not None:
            self._between.labels(model).observe(between / 1000)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)


_HELD: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
    ("qrun_slots", "Answers that may advance together.", lambda engine: engine.slots),
    ("qrun_active_slots", "Prompts that are being answered.", lambda engine: engine.active),
    ("qrun_queued_requests", "Prompts that wait for a slot.", lambda engine: engine.queued),
    ("qrun_kv_cache_bytes", "Memory of the slots' keys and values.", lambda engine: engine.cache_bytes),
    ("qrun_prefix_cache_bytes", "Memory of kept beginnings.", lambda engine: engine.prefix_bytes),
    ("qrun_prefix_cache_hit_tokens", "Tokens found there.", lambda engine: engine.prefix_hits),
)


class _InUse(Collector):
    """Gauges of what the engines hold, read whenever the metrics are asked for."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        for name, what, value in _HELD:
            family = GaugeMetricFamily(name, what, labels=["model"])
            for model, engine in self._engines.items():
                family.add_metric([model], value(engine))
            yield family
