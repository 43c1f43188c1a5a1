"""What /metrics tells. One registry for each service, so that two in one process do not meet."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from bot.conversations.log import LoggedTurn
from bot.engine.request import EngineStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    def __init__(self, engine_stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine_stats))
        self._turns = Counter(
            "frontdesk_turns",
            "Turns, by the version that answered and how they ended",
            ["domain", "version", "finish_reason"],
            registry=self._registry,
        )
        self._routing = Counter("frontdesk_routing_decisions", "Routing decisions", ["reason"], registry=self._registry)
        self._tokens = Counter("frontdesk_generated_tokens", "Generated tokens", ["domain"], registry=self._registry)
        self._first_token = self._histogram("frontdesk_first_token_seconds", "From a message to its first token")
        self._total = self._histogram("frontdesk_turn_seconds", "From a message to the end of its answer")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["domain"], buckets=_SECONDS, registry=self._registry)

    def record(self, turn: LoggedTurn) -> None:
        domain = turn.domain or ""
        self._turns.labels(domain, str(turn.version or ""), turn.finish_reason).inc()
        self._routing.labels(turn.routing_reason).inc()
        self._tokens.labels(domain).inc(len(turn.token_ids))
        self._total.labels(domain).observe(turn.total_ms / 1000)
        if turn.first_token_ms is not None:
            self._first_token.labels(domain).observe(turn.first_token_ms / 1000)

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the engine's own counts when somebody asks, instead of mirroring them at every step."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        stats = self._stats()
        for name in EngineStats.__slots__:
            gauge = GaugeMetricFamily(f"frontdesk_engine_{name.removeprefix('num_')}", f"Engine: {name.replace('_', ' ')}")
            gauge.add_metric([], getattr(stats, name))
            yield gauge
