"""The cache tiers in /metrics."""

from prometheus_client.parser import text_string_to_metric_families

from bot.engine.request import EngineStats, PrefixStats
from bot.telemetry import Telemetry
from prompt_bank.cache import ReadStats


def samples(prefix: PrefixStats, blobs: ReadStats, stored: ReadStats | None = None) -> dict[tuple[str, ...], float]:
    """Value by name, tier and result."""
    exposition = (
        Telemetry(lambda: EngineStats(1, 2, 3, prefix), lambda: {"redis": blobs, "store": stored or ReadStats()})
        .exposition()
        .decode()
    )
    families = text_string_to_metric_families(exposition)
    both = ("tier", "result")
    return {
        (one.name, *(one.labels[label] for label in both if label in one.labels)): one.value
        for family in families
        for one in family.samples
    }


def test_every_tier_is_in_one_family() -> None:
    prefix = PrefixStats(
        num_hits=6, num_misses=3, num_errors=1, num_evictions=2, num_entries=4, num_bytes=4096, num_pinned_bytes=1024
    )
    seen = samples(prefix, ReadStats(num_hits=1, num_misses=2, num_errors=1), ReadStats(num_hits=2, num_errors=1))
    assert {key[1:]: value for key, value in seen.items() if key[0] == "frontdesk_cache_requests_total"} == {
        ("prefix_kv", "hit"): 6,
        ("prefix_kv", "miss"): 3,
        ("prefix_kv", "error"): 1,
        ("redis", "hit"): 1,
        ("redis", "miss"): 2,
        ("redis", "error"): 1,
        ("store", "hit"): 2,
        ("store", "miss"): 0,
        ("store", "error"): 1,
    }
    assert seen["frontdesk_cache_hit_ratio", "prefix_kv"] == 0.6
    assert seen["frontdesk_cache_hit_ratio", "redis"] == 0.25
    assert seen["frontdesk_cache_bytes", "prefix_kv"] == 4096
    assert seen["frontdesk_cache_pinned_bytes", "prefix_kv"] == 1024
    assert seen["frontdesk_cache_entries", "prefix_kv"] == 4
    assert seen["frontdesk_cache_evictions_total", "prefix_kv"] == 2
    assert seen["frontdesk_engine_active",] == 1
    assert seen["frontdesk_engine_waiting",] == 2
    assert seen["frontdesk_engine_generated_tokens",] == 3


def test_a_tier_nobody_asked_has_no_ratio() -> None:
    seen = samples(PrefixStats(0, 0, 0, 0, 0, 0, 0), ReadStats(num_misses=1))
    assert ("frontdesk_cache_hit_ratio", "prefix_kv") not in seen
    assert seen["frontdesk_cache_hit_ratio", "redis"] == 0
