"""What a server has done, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from peftkit.serving.host import Host

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
"""The label of names that are not served, and of ends that are not listed."""
_ENDS = frozenset({"stop", "length", "tool_calls", "cancelled", "failed"})
_TOKENS = "Tokens of answers, of those that were cut off as far as they came; of failed ones none"
_MOST_LABELS = 1000
"""Names that are told apart in a server's life: each costs about 40 series."""
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts requests, and asks a host how busy it is whenever it is read. Used from one event loop."""

    def __init__(self, host: Host) -> None:
        self._host, self._registry = host, CollectorRegistry()
        self._labels: set[str] = set()
        counter = partial(Counter, namespace="peftkit", registry=self._registry)
        histogram = partial(Histogram, namespace="peftkit", registry=self._registry, labelnames=("model",))
        self.requests = counter("requests", "Requests that were taken, by how they ended", ("model", "end"))
        self.not_taken = counter("refused", "Requests that were refused or failed, by HTTP status", ("status",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", ("model",))
        self.completion_tokens = counter("completion_tokens", _TOKENS, ("model",))
        self.disconnects = counter("disconnects", "Answers that were cut off: their client left, or time ran out")
        self.first_token = histogram("first_token_seconds", "Seconds until the first piece of text", buckets=_FIRST)
        self.request = histogram("request_seconds", "Seconds until an answer was whole", buckets=_WHOLE)
        self._registry.register(_Engine(host))

    def begun(self, model: str) -> Watch:
        """A request was taken."""
        return Watch(self, self._label(model))

    def refused(self, status: int) -> None:
        """A request was answered with a status from 400 on."""
        self.not_taken.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)

    def _label(self, model: str) -> str:
        """A served name; whatever else is asked for must not make new series."""
        served = {each.id for each in self._host.models()}
        if model == "base":
            model = self._host.base
        label = next((name for name in (model, model.partition("@")[0]) if name in served), OTHER)
        if label not in self._labels and len(self._labels) >= _MOST_LABELS:
            return OTHER
        self._labels.add(label)
        return label


class Watch:
    """One request, from its beginning to its end."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._since = time.perf_counter()
        self._waits, self._ended = True, False

    def first(self) -> None:
        """The first piece of text is there; later calls count for nothing."""
        if self._waits:
            self._waits = False
            self._metrics.first_token.labels(self._model).observe(time.perf_counter() - self._since)

    def late(self, tokens: int) -> None:
        """An answer that was cut off came to its end after the request; `ended` did not know its tokens."""
        self._metrics.completion_tokens.labels(self._model).inc(tokens)

    def ended(self, finish: str, prompt_tokens: int, tokens: int) -> None:
        """It has ended; later calls count for nothing."""
        if self._ended:
            return
        self._ended = True
        metrics = self._metrics
        metrics.requests.labels(self._model, finish if finish in _ENDS else OTHER).inc()
        metrics.request.labels(self._model).observe(time.perf_counter() - self._since)
        metrics.prompt_tokens.labels(self._model).inc(prompt_tokens)
        metrics.completion_tokens.labels(self._model).inc(tokens)
        if finish == "cancelled":
            metrics.disconnects.inc()


class _Engine:
    """How busy the host's engine is at the moment of reading."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterable[Metric]:
        """The figures, in the client library's shape."""
        load = self._host.load()
        gauges: dict[str, tuple[float, str]] = {
            "running": (load.running, "Requests that are being answered"),
            "waiting": (load.waiting, "Requests that wait for a row"),
            "resident_adapters": (len(load.resident), "Adapters that can answer without being loaded"),
            "adapter_bytes": (load.adapter_bytes, "Memory of the adapters that are in the engine"),
            "models": (len(self._host.models()), "Names that are served, the base among them"),
        }
        counters: dict[str, tuple[float, str]] = {
            "adapter_hits": (load.hits, "Times that an adapter was there when it was asked for"),
            "adapter_misses": (load.misses, "Times that an adapter had to be loaded"),
            "adapter_miss_seconds": (load.miss_seconds, "Seconds that loading took"),
            "adapter_evictions": (load.evictions, "Adapters that made room for others"),
            "swaps": (self._host.swaps, "Times that a name changed its version"),
        }
        for name, (value, said) in gauges.items():
            yield GaugeMetricFamily(f"peftkit_{name}", said, value=value)
        for name, (value, said) in counters.items():
            yield CounterMetricFamily(f"peftkit_{name}", said, value=value)
