"""Slack's rate limits: a token bucket for each method and workspace, for posting one for each channel as well.

Slack publishes tiers and says that bursts are tolerated, not how it counts; a bucket of a minute's calls is the plainest
reading.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bot.channels.slack.sandbox.clock import Clock


@dataclass(frozen=True, slots=True)
class Rate:
    """`calls` every `per_s` seconds; as many as `burst` at once, which is a whole period's calls unless said."""

    calls: float
    per_s: float = 60.0
    burst: int | None = None

    @property
    def capacity(self) -> float:
        return self.burst if self.burst is not None else self.calls


_TIER_1 = Rate(1, burst=10)  # "a small amount of burst behavior is tolerated"
_TIER_2 = Rate(20)
_TIER_3 = Rate(50)
_TIER_4 = Rate(100)

# For apps that are distributed outside the Marketplace.
REPLIES_OUTSIDE_MARKETPLACE = Rate(1)

TIERS: Mapping[str, Rate] = {
    "agents.sessions.setStatus": _TIER_3,
    "api.test": _TIER_4,
    "apps.connections.open": _TIER_1,
    "apps.uninstall": _TIER_1,
    "assistant.threads.setStatus": Rate(600),
    "assistant.threads.setSuggestedPrompts": _TIER_3,
    "assistant.threads.setTitle": _TIER_3,
    "auth.revoke": _TIER_3,
    "auth.test": Rate(600),
    "chat.appendStream": _TIER_4,
    "chat.delete": _TIER_3,
    "chat.postEphemeral": _TIER_4,
    "chat.postMessage": Rate(1, per_s=1.0, burst=5),
    "chat.startStream": _TIER_2,
    "chat.stopStream": _TIER_2,
    "chat.update": _TIER_3,
    "conversations.history": _TIER_3,
    "conversations.info": _TIER_3,
    "conversations.members": _TIER_4,
    "conversations.open": _TIER_3,
    "conversations.replies": _TIER_3,
    "oauth.v2.access": _TIER_4,
    "reactions.add": _TIER_3,
    "reactions.remove": _TIER_2,
    "users.info": _TIER_4,
    "views.open": _TIER_4,
    "views.publish": _TIER_4,
    "views.push": _TIER_4,
    "views.update": _TIER_4,
}


class _Bucket:
    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._calls = rate.capacity
        self._at = now

    def take(self, now: float) -> float:
        """Takes one call, or says in how many seconds there will be one."""
        per_second = self._rate.calls / self._rate.per_s
        self._calls = min(self._rate.capacity, self._calls + (now - self._at) * per_second)
        self._at = now
        if self._calls >= 1 - 1e-6:
            self._calls -= 1
            return 0.0
        return (1 - self._calls) / per_second


class Tiers:
    """Counts calls; `rates` replaces single methods' rates."""

    def __init__(self, clock: Clock, rates: Mapping[str, Rate]) -> None:
        self._clock = clock
        self._rates = {**TIERS, **rates}
        self._buckets: dict[tuple[str, ...], _Bucket] = {}

    def retry_after_s(self, method: str, app_id: str, team_id: str, channel_id: str, is_marketplace: bool) -> int:
        """0 when the call is allowed and counted, else the whole seconds to wait."""
        rate = self._rates[method]
        if method in ("conversations.history", "conversations.replies") and not is_marketplace:
            rate = REPLIES_OUTSIDE_MARKETPLACE
        where = channel_id if method == "chat.postMessage" else ""
        now = self._clock.now()
        bucket = self._buckets.setdefault((method, app_id, team_id, where), _Bucket(rate, now))
        return math.ceil(bucket.take(now))
