"""The inbox: messages that were acknowledged and are not answered yet, in Redis, in order, for any number of processes.

Conversations are claimed, not messages: a claim takes one ready conversation with a lease, its worker answers the message at
the head and gives the conversation back, and nobody else works on it meanwhile. A worker that dies loses its lease, and the
conversation is ready again with all its messages in their order. The log's fence keeps what a frozen worker does late from
counting. A message that was delivered too often goes to the dead letters, from which an operator can replay it.

Nothing of it has a TTL, so a full memory evicts none of it. In each script the first write is one that a full memory allows,
so that what is there can always be worked off; only `put` is refused. Time is the server's own, so that workers' clocks do
not matter. Knows nothing of what a message says.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Self
from uuid import uuid4

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import OutOfMemoryError, RedisError

from bot.conversations.ending import end
from bot.conversations.inbox_scripts import SCRIPTS
from prompt_bank.cache import TableClaim, asking_redis, table_claim
from prompt_bank.errors import FrontdeskError, InboxFullError, RateLimitedError, RedisUnavailableError

log = logging.getLogger(__name__)

MAX_DELIVERIES = 5
_SEEN_S = 3600.0  # a redelivery comes within minutes; older ones are known by the log
_RELEASE_AGAIN_S = 0.5
_MAX_UNRELEASED = 1000  # claims that Redis is still to be told of; of more than these the leases end by themselves


@dataclass(frozen=True, slots=True)
class InboxMessage:
    """A message as it waits. `settings` is what its channel needs for its answer, as JSON; it counts for its `owners`."""

    id: str
    conversation_id: str
    text: str
    received_at: float  # seconds since 1970
    settings: dict[str, Any]
    owners: tuple[str, ...] = ()

    def dumped(self) -> str:
        content = {"text": self.text, "received_at": self.received_at, "settings": self.settings}
        return "\n".join((self.id, " ".join(self.owners), json.dumps(content)))

    @classmethod
    def parsed(cls, conversation_id: str, entry: str) -> Self:
        id_, owners, content = entry.split("\n", 2)
        return cls(id_, conversation_id, **json.loads(content), owners=tuple(owners.split()))


@dataclass(frozen=True, slots=True)
class Claim:
    """A conversation that is ours until its lease ends, and the pointer table's stamp as of then."""

    conversation_id: str
    token: str
    table: TableClaim


@dataclass(frozen=True, slots=True)
class MessageClaim(Claim):
    message: InboxMessage
    num_deliveries: int
    is_stopped: bool


@dataclass(frozen=True, slots=True)
class DeadLetter:
    message: InboxMessage
    num_deliveries: int
    died_at: float


@dataclass(frozen=True, slots=True)
class InboxState:
    """What waits, and what is being worked: conversation to its number of messages, and seconds until its lease ends."""

    num_queued: int
    waiting: dict[str, int]
    leased: dict[str, float]
    num_dead: int


LeaseState = Literal["leased", "stopped", "lost"]


class Inbox:
    """Used from one event loop. Every method raises RedisUnavailableError."""

    def __init__(
        self,
        redis: "Redis",
        prefix: str,
        table_key: str,
        *,
        lease_s: float = 15.0,
        max_messages: int = 10_000,
        max_conversation_messages: int = 20,
    ) -> None:
        self._redis = redis
        self._prefix = prefix
        self._table_key = table_key
        self.lease_s = lease_s
        self._max_messages = max_messages
        self._max_conversation_messages = max_conversation_messages
        self._scripts: dict[str, AsyncScript] = {name: redis.register_script(script) for name, script in SCRIPTS.items()}
        self._unreleased: dict[str, tuple[Claim, float]] = {}  # by token, with when its lease ends
        self._releasing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """What Redis did not let us give back is free when its lease ends."""
        if self._releasing is not None:
            await end(self._releasing)

    async def _run(self, name: str, *arguments: str | float) -> Any:
        try:
            return await self._scripts[name](keys=[self._prefix, self._table_key], args=list(arguments))
        except RedisError as error:
            if isinstance(error, OutOfMemoryError) or "OOM" in str(error):  # a script's own error has the name in its text
                log.error("redis has no memory left, no message is taken: %s", error)
                raise InboxFullError(f"redis has no memory left for another message: {error}") from error
            raise RedisUnavailableError(f"redis does not answer: {error}") from error

    async def put(self, message: InboxMessage, limits: Mapping[str, int] | None = None) -> bool:
        """Makes a message durable; False when it is there or was there already. `limits` say how many messages each of its
        owners may have waiting. Raises InboxFullError or RateLimitedError with nothing changed.
        """
        outcome = _text(
            await self._run(
                "put",
                message.conversation_id,
                message.id,
                message.dumped(),
                self._max_messages,
                self._max_conversation_messages,
                int(_SEEN_S * 1000),
                *((limits or {}).get(owner, self._max_messages) for owner in message.owners),
            )
        )
        if outcome == "full":
            raise InboxFullError(f"{self._max_messages} messages wait, no more are taken; try later")
        if outcome == "owner full":
            raise RateLimitedError("as many messages of this API key or person wait as may; await their answers")
        if outcome == "conversation full":
            raise InboxFullError(f"{self._max_conversation_messages} messages of this conversation wait; await their answers")
        return outcome == "queued"

    async def claim(self) -> tuple[MessageClaim | None, float | None]:
        """The next ready conversation with its first message, if there is one; and seconds until some lease ends."""
        token = uuid4().hex
        try:
            next_ms, id_, epoch, pending, *claimed = await self._run(
                "claim", token, _ms(self.lease_s), MAX_DELIVERIES, FrontdeskError.sentence
            )
        except RedisUnavailableError:
            self._release_later(Claim("", token, TableClaim(None)))
            raise
        next_s = None if int(next_ms) < 0 else int(next_ms) / 1000
        if not claimed:
            return None, next_s
        conversation_id, entry, num_deliveries, is_stopped = claimed
        message = InboxMessage.parsed(_text(conversation_id), _text(entry))
        table = table_claim(id_, epoch, pending)
        return MessageClaim(message.conversation_id, token, table, message, num_deliveries, bool(is_stopped)), next_s

    async def claim_conversation(self, conversation_id: str) -> Claim | None:
        """This conversation, for a caller with a message of their own; None while it is being worked or messages wait in it."""
        token = uuid4().hex
        try:
            claimed = await self._run("claim_one", conversation_id, token, _ms(self.lease_s))
        except (RedisUnavailableError, asyncio.CancelledError):  # it may be claimed, and only the answer was lost
            self._release_later(Claim(conversation_id, token, TableClaim(None)))
            raise
        return Claim(conversation_id, token, table_claim(*claimed)) if claimed else None

    async def renew(self, claim: Claim) -> LeaseState:
        """Extends the lease; tells whether it is lost, or the answer is to be stopped."""
        state: LeaseState = _text(await self._run("renew", claim.conversation_id, claim.token, _ms(self.lease_s)))  # type: ignore[assignment]
        return state

    async def finish(self, claim: MessageClaim) -> bool:
        """Takes the answered message away and gives the conversation back. False when the claim was lost."""
        return _text(await self._run("finish", claim.conversation_id, claim.token, claim.message.id)) == "leased"

    async def release(self, claim: Claim, *, after_s: float = 0.0, is_undelivered: bool = False) -> None:
        """Gives the conversation back with its messages; `is_undelivered` when this was no try that counts.

        The conversation's id may be empty: it is found by the claim's token.
        """
        await self._run("release", claim.conversation_id, claim.token, _ms(after_s), int(is_undelivered))

    async def give_back(self, claim: Claim) -> None:
        """Releases a conversation that was claimed for a caller's own message; as soon as Redis answers again if it does not.

        Alone of all methods it raises nothing.
        """
        try:
            await self.release(claim)
        except RedisUnavailableError:
            self._release_later(claim)

    def _release_later(self, claim: Claim) -> None:
        if len(self._unreleased) >= _MAX_UNRELEASED:
            return
        self._unreleased[claim.token] = claim, time.monotonic() + self.lease_s
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.create_task(self._release_unreleased())

    async def _release_unreleased(self) -> None:
        """One after the other: Redis may be away, and its connections are few."""
        while self._unreleased:
            await asyncio.sleep(_RELEASE_AGAIN_S)
            with suppress(RedisUnavailableError):
                for token, (claim, ends_at) in list(self._unreleased.items()):
                    if time.monotonic() < ends_at:
                        await self.release(claim, is_undelivered=True)
                    del self._unreleased[token]

    @asynccontextmanager
    async def keeping(self, claim: Claim | None) -> AsyncIterator[None]:
        """Renews the lease meanwhile, for as long as it is ours; the fence is what counts if it is lost."""
        renewing = asyncio.create_task(self._keep(claim)) if claim else None
        try:
            yield
        finally:
            if renewing is not None:
                await end(renewing)

    async def _keep(self, claim: Claim) -> None:
        state: LeaseState = "leased"
        while state != "lost":
            await asyncio.sleep(self.lease_s / 3)
            with suppress(RedisUnavailableError):
                state = await self.renew(claim)

    async def stop(self, conversation_id: str, message_id: str | None = None) -> str | None:
        """Has a message not be answered, or no further: the one with this id, or the first of the conversation.

        Gives its id, None when it does not wait there.
        """
        stopped = await self._run("stop", conversation_id, message_id or "")
        return _text(stopped) if stopped else None

    async def has(self, conversation_id: str, message_id: str) -> bool:
        """Whether a message waits, or is being answered."""
        with asking_redis():
            entries: Sequence[Any] = await self._redis.lrange(f"{self._prefix}inbox:{conversation_id}", 0, -1)
        return any(_text(entry).partition("\n")[0] == message_id for entry in entries)

    async def state(self) -> InboxState:
        """For operators: what waits and what is worked."""
        p = self._prefix
        with asking_redis():
            async with self._redis.pipeline() as pipe:
                pipe.time()
                pipe.get(f"{p}queued")
                pipe.zrange(f"{p}ready", 0, -1)
                pipe.zrange(f"{p}leases", 0, -1, withscores=True)
                pipe.llen(f"{p}dead")
                (seconds, micros), queued, ready, leases, num_dead = await pipe.execute()
                now = seconds + micros / 1e6
                names = [_text(name) for name in [*ready, *(name for name, _ in leases)]]
                for name in names:
                    pipe.llen(f"{p}inbox:{name}")
                lengths = await pipe.execute() if names else []
        leased = {_text(name): float(deadline) / 1000 - now for name, deadline in leases}
        return InboxState(int(queued or 0), dict(zip(names, lengths, strict=True)), leased, num_dead)

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Newest first."""
        with asking_redis():
            letters: Sequence[Any] = await self._redis.lrange(f"{self._prefix}dead", 0, limit - 1)
        return [_dead_letter(letter) for letter in letters]

    async def replay(self, limit: int) -> int:
        """Puts the oldest dead letters back into their conversations; gives how many."""
        return int(await self._run("replay", limit))


def _dead_letter(letter: bytes) -> DeadLetter:
    conversation_id, entry, num_deliveries, died_ms = json.loads(letter)
    return DeadLetter(InboxMessage.parsed(conversation_id, entry), num_deliveries, died_ms / 1000)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
