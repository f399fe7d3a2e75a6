"""Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from headway.engine.request import EngineStats

_TTFT_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_ITL_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_DURATION_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class EngineCollector(Collector):
    """What the engine counts itself, read when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        s = self._stats()
        gauges: tuple[tuple[str, str, float], ...] = (
            ("requests_running", "Requests whose KV is in the cache and that are computed", s.running),
            ("requests_waiting", "Requests waiting for pages or for a place in the batch", s.waiting),
            ("kv_cache_pages_used", "Pages of the KV cache held by requests", s.pages_used),
            ("kv_cache_pages_total", "Pages of the KV cache", s.pages_total),
            ("prefix_cache_hit_rate", "Prompt tokens found in the prefix cache, of those looked up",
             s.prefix_cache_hit_tokens / max(1, s.prefix_cache_query_tokens)),
        )  # fmt: skip
        counters: tuple[tuple[str, str, float], ...] = (
            ("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache",
             s.prefix_cache_hit_tokens),
            ("prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache",
             s.prefix_cache_query_tokens),
            ("preemptions", "Requests put back to waiting because pages ran out", s.preemptions),
            ("prompt_tokens", "Prompt tokens of all requests", s.prompt_tokens),
            ("output_tokens", "Tokens generated", s.output_tokens),
        )  # fmt: skip
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"headway_{name}", text, value=value)
        for name, text, value in counters:
            yield CounterMetricFamily(f"headway_{name}", text, value=value)
        for name, value in s.extra.items():
            yield GaugeMetricFamily(f"headway_{name}", "Reported by the engine", value=value)


class Metrics:
    """Counters and histograms that the HTTP side fills, beside the engine's own."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(stats))
        self.requests = Counter(
            "headway_requests",
            "Finished HTTP requests by endpoint and status (499: the client went away)",
            ("endpoint", "status"),
            registry=self.registry,
        )
        self.finished = Counter(
            "headway_choices_finished",
            "Finished choices by finish reason",
            ("finish_reason",),
            registry=self.registry,
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token", "From arrival to the first token of a choice", _TTFT_SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency", "Between steps that gave a choice tokens", _ITL_SECONDS
        )
        self.request_duration = self._histogram(
            "request_duration", "From arrival to a choice's last token", _DURATION_SECONDS
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"headway_{name}_seconds", text, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """The text that ``/metrics`` answers with."""
        return generate_latest(self.registry)
