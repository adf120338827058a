"""Prometheus metrics of the server: what is asked, how long it takes, what is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from qrun.decoding.speculation import Speculation
from qrun.engine import Engine
from qrun.serve.models import Served

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server; each server has a registry of its own.

    Args:
        models: by their names.
    """

    def __init__(self, models: Mapping[str, Served]) -> None:
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
        self._registry.register(_InUse(models))

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


_MODELS: tuple[tuple[str, str, Callable[[Served], float]], ...] = (
    ("qrun_slots", "Answers that may advance together.", lambda served: served.source.slots),
    ("qrun_model_loaded", "1 while the model is open.", lambda served: served.engine is not None),
    ("qrun_model_loads", "How often the model was opened.", lambda served: served.loads),
    ("qrun_model_uses", "Requests that use the model, or wait for it.", lambda served: served.uses),
    ("qrun_model_bytes", "Memory of weights and for kept beginnings.", lambda served: served.held_bytes),
)


def _guesses(engine: Engine) -> Speculation:
    return engine.speculation or Speculation()


# Zero for a model that is not open.
_HELD: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
    ("qrun_active_slots", "Prompts that are being answered.", lambda engine: engine.active),
    ("qrun_queued_requests", "Prompts that wait for a slot.", lambda engine: engine.queued),
    ("qrun_kv_cache_bytes", "Memory of the slots' keys and values.", lambda engine: engine.cache_bytes),
    ("qrun_prefix_cache_bytes", "Memory of kept beginnings.", lambda engine: engine.prefix_bytes),
    ("qrun_prefix_cache_hit_tokens", "Tokens found there.", lambda engine: engine.prefix_hits),
    (
        "qrun_guessed_tokens",
        "Tokens that were tried in steps of several.",
        lambda engine: _guesses(engine).guessed,
    ),
    ("qrun_accepted_tokens", "Those of them that came true.", lambda engine: _guesses(engine).accepted),
)


class _InUse(Collector):
    """Gauges of what the models hold, read whenever the metrics are asked for."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        for name, what, of_model in _MODELS:
            family = GaugeMetricFamily(name, what, labels=["model"])
            for model, served in self._models.items():
                family.add_metric([model], of_model(served))
            yield family
        engines = {model: served.engine for model, served in self._models.items()}
        for name, what, of_engine in _HELD:
            family = GaugeMetricFamily(name, what, labels=["model"])
            for model, engine in engines.items():
                family.add_metric([model], 0 if engine is None else of_engine(engine))
            yield family
