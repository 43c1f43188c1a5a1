"""What /metrics tells. One registry for each service, so that two in one process do not meet."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from bot.conversations.records import LoggedTurn
from bot.engine.request import EngineStats, PrefixStats
from prompt_bank.cache import ReadStats
from prompt_bank.version import Version

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Telemetry:
    def __init__(self, engine_stats: Callable[[], EngineStats], read_stats: Callable[[], Mapping[str, ReadStats]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StatsCollector(engine_stats, read_stats))
        self._turns = Counter(
            "frontdesk_turns",
            "Turns, by the version that answered and how they ended",
            ["domain", "version", "finish_reason"],
            registry=self._registry,
        )
        self._routing = Counter("frontdesk_routing_decisions", "Routing decisions", ["reason"], registry=self._registry)
        self._tokens = Counter("frontdesk_generated_tokens", "Generated tokens", ["domain"], registry=self._registry)
        self._shadows = Counter(
            "frontdesk_shadow_answers",
            "Answers of shadow versions, by what became of them",
            ["domain", "version", "outcome"],
            registry=self._registry,
        )
        self._first_token = self._histogram("frontdesk_first_token_seconds", "From a message to its first token")
        self._total = self._histogram("frontdesk_turn_seconds", "From a message to the end of its answer")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["domain"], buckets=_SECONDS, registry=self._registry)

    def record(self, turn: LoggedTurn, num_alternative_tokens: int = 0) -> None:
        domain = turn.domain or ""
        self._turns.labels(domain, str(turn.version or ""), turn.finish_reason).inc()
        self._routing.labels(turn.routing_reason).inc()
        self._tokens.labels(domain).inc(len(turn.token_ids) + num_alternative_tokens)
        self._total.labels(domain).observe(turn.total_ms / 1000)
        if turn.first_token_ms is not None:
            self._first_token.labels(domain).observe(turn.first_token_ms / 1000)

    def record_shadow(self, version: Version, outcome: Literal["answered", "skipped", "failed", "cancelled"]) -> None:
        self._shadows.labels(version.manifest.domain, str(version.manifest.version), outcome).inc()

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _StatsCollector(Collector):
    """Reads the engine's and the bank's own counts when somebody asks, instead of mirroring them at every step."""

    def __init__(self, engine_stats: Callable[[], EngineStats], read_stats: Callable[[], Mapping[str, ReadStats]]) -> None:
        self._engine_stats = engine_stats
        self._read_stats = read_stats

    def collect(self) -> Iterator[Any]:
        engine = self._engine_stats()
        for name in ("num_active", "num_waiting", "num_generated_tokens"):
            gauge = GaugeMetricFamily(f"frontdesk_engine_{name.removeprefix('num_')}", f"Engine: {name.replace('_', ' ')}")
            gauge.add_metric([], getattr(engine, name))
            yield gauge
        yield from _requests({"prefix_kv": engine.prefix, **self._read_stats()})
        evictions = CounterMetricFamily("frontdesk_cache_evictions", "Entries evicted by a cache tier", labels=["tier"])
        evictions.add_metric(["prefix_kv"], engine.prefix.num_evictions)
        yield evictions
        for name, text, value in (
            ("entries", "Entries in a cache tier", engine.prefix.num_entries),
            ("bytes", "Bytes in a cache tier", engine.prefix.num_bytes),
            ("pinned_bytes", "Bytes in a cache tier that are in use", engine.prefix.num_pinned_bytes),
        ):
            gauge = GaugeMetricFamily(f"frontdesk_cache_{name}", text, labels=["tier"])
            gauge.add_metric(["prefix_kv"], value)
            yield gauge


def _requests(tiers: Mapping[str, PrefixStats | ReadStats]) -> Iterator[Any]:
    requests = CounterMetricFamily("frontdesk_cache_requests", "Requests to a cache tier", labels=["tier", "result"])
    ratio = GaugeMetricFamily("frontdesk_cache_hit_ratio", "Hits among a cache tier's requests, since start", labels=["tier"])
    for tier, stats in tiers.items():
        requests.add_metric([tier, "hit"], stats.num_hits)
        requests.add_metric([tier, "miss"], stats.num_misses)
        requests.add_metric([tier, "error"], stats.num_errors)
        num_requests = stats.num_hits + stats.num_misses + stats.num_errors
        if num_requests:  # before the first there is no ratio
            ratio.add_metric([tier], stats.num_hits / num_requests)
    yield requests
    yield ratio
