"""The conversation log: every turn with the version that answered it, in SQL. Knows nothing of channels, engine or routing.

A turn is written once, when it has ended, however it ended, and only by the worker whose claim of the conversation is the last
one (its fence; Kleppmann 2016, "How to do distributed locking"). Feedback joins to exactly one turn. Reading is in `reading`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Boolean, ColumnElement, String, bindparam, case, func, insert, literal, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from bot.conversations.database import Database
from bot.conversations.reading import history, turn_of_message
from bot.conversations.records import Caller, Channel, ConversationState, LoggedTurn, ShadowAnswer, Vote, new_id
from bot.conversations.schema import conversations, feedback, shadow_answers, turns
from prompt_bank.conversation import Message
from prompt_bank.errors import FencedError, UnknownConversationError, UnknownTurnError

_STATE = (conversations.c.id, conversations.c.domain, conversations.c.is_domain_fixed, conversations.c.fence)
# Statements that are made once: to make them costs more than to execute them.
_CLAIM = (
    update(conversations)
    .where(conversations.c.id == bindparam("conversation_id"))
    .values(fence=conversations.c.fence + 1)
    .returning(*_STATE)
)
_MOVE = update(conversations).values(
    updated_at=bindparam("now"),
    domain=func.coalesce(bindparam("new_domain", type_=String), conversations.c.domain),
    transcript=case(
        (bindparam("is_whole", type_=Boolean), bindparam("new_transcript", type_=String)), else_=conversations.c.transcript
    ),
)
_MOVE_CLAIMED = _MOVE.where(conversations.c.id == bindparam("conversation_id"), conversations.c.fence == bindparam("own_fence"))
# Nobody could claim it before, but its creator may have gone on in it meanwhile, by its id.
_MOVE_CREATED = _MOVE.where(conversations.c.id == bindparam("conversation_id"), conversations.c.key == bindparam("own_key"))
_POSITION = select(func.coalesce(func.max(turns.c.position) + 1, 0)).where(
    turns.c.conversation_id == bindparam("conversation_id")
)
_APPEND = insert(turns).values(
    position=_POSITION.scalar_subquery(),
    **{name: bindparam(name) for name in (*(field.name for field in fields(LoggedTurn)), "created_at")},
)


def transcript_digest(messages: Sequence[Message]) -> str:
    """Identifies a conversation by what was said; system messages do not count, since clients change them between turns."""
    digest = hashlib.sha256()
    for message in messages:
        if message.role != "system":
            digest.update(f"{message.role}\x1f{message.content}\x1e".encode())
    return digest.hexdigest()


class ConversationLog:
    """Safe to use from many tasks of one event loop. Every method raises LogUnavailableError."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._create = database.insert_if_new(conversations)

    async def check(self) -> None:
        """Raises LogUnavailableError when the database does not answer."""
        async with self._database.reading() as connection:
            await connection.execute(select(literal(1)))

    async def find(self, caller: Caller, given_id: str | None, earlier: Sequence[Message]) -> ConversationState | None:
        """The conversation a message belongs to: the one with the given id, or the one whose messages so far equal `earlier`.

        Nobody continues another caller's conversation.
        """
        if given_id is not None:
            return await self._state(conversations.c.key == _key(caller, given_id))
        if not any(message.role != "system" for message in earlier):
            return None
        is_theirs = (conversations.c.scope == caller.scope) & conversations.c.person.is_not_distinct_from(caller.person)
        return await self._state(is_theirs & (conversations.c.transcript == transcript_digest(earlier)))

    async def _state(self, condition: ColumnElement[bool]) -> ConversationState | None:
        query = select(*_STATE).where(condition).order_by(conversations.c.created_at.desc()).limit(1)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        return ConversationState(*row) if row is not None else None

    async def create(
        self,
        caller: Caller,
        given_id: str | None = None,
        *,
        channel: Channel = "api",
        domain: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> ConversationState | None:
        """A new conversation, already claimed by the caller (fence 1); with a `domain`, that one answers all of its turns.

        None when there is one with the given id.
        """
        id_ = new_id()
        async with self._database.writing() as connection:
            if given_id is not None and not await _is_taken(connection, given_id):
                id_ = given_id
            values = _new_conversation(id_, caller, given_id or id_, channel, domain, metadata)
            inserted = await connection.execute(self._create, values)
        return ConversationState(id_, domain, domain is not None, fence=1) if inserted.rowcount else None

    async def claim(self, conversation_id: str) -> ConversationState:
        """Takes the conversation from whoever claimed it before, by raising its fence. Raises UnknownConversationError."""
        async with self._database.writing() as connection:
            return await _claimed(connection, conversation_id)

    async def take_up(
        self, conversation_id: str, message_id: str, max_turns: int
    ) -> tuple[ConversationState, list[Message]] | LoggedTurn:
        """Claims the conversation for a message of its inbox; with the last of what was said before.

        Gives the message's turn instead if it was answered already. Raises UnknownConversationError.
        """
        async with self._database.writing() as connection:
            # Claimed first: whoever is writing its answer is waited for.
            state = await _claimed(connection, conversation_id)
            if (answered := await turn_of_message(connection, message_id)) is not None:
                return answered
            return state, await history(connection, conversation_id, max_turns)

    async def append(
        self, turn: LoggedTurn, transcript: Sequence[Message] | None, fence: int, *, creator: Caller | None = None
    ) -> None:
        """Writes a turn and moves its conversation on; `transcript` are the conversation's messages, with this answer as the
        last, where its caller keeps them. Given its `creator`, the conversation comes to be with this turn.

        A turn that was cancelled or failed moves nothing: its caller asks again with the messages that were there before.
        Raises FencedError with nothing written when another has claimed the conversation since, or has answered this message.
        """
        now = datetime.now(UTC)
        moved = {
            "conversation_id": turn.conversation_id,
            "now": now,
            "is_whole": turn.is_whole,
            "new_domain": turn.domain if turn.is_whole else None,
            # Without one, no caller knows its messages any more: none continues it by them.
            "new_transcript": transcript_digest(transcript) if transcript else None,
        }
        try:
            async with self._database.writing() as connection:
                if creator is None:
                    moved_rows = await connection.execute(_MOVE_CLAIMED, {**moved, "own_fence": fence})
                else:
                    new = _new_conversation(turn.conversation_id, creator, turn.conversation_id, fence=fence)
                    await connection.execute(self._create, new)
                    moved_rows = await connection.execute(_MOVE_CREATED, {**moved, "own_key": new["key"]})
                if moved_rows.rowcount == 0:
                    raise FencedError(f"conversation {turn.conversation_id} was claimed by another after fence {fence}")
                await connection.execute(_APPEND, {**asdict(turn), "created_at": now})
        except IntegrityError as error:
            raise FencedError(f"message {turn.message_id} of {turn.conversation_id} was answered by another") from error

    async def add_feedback(
        self,
        turn_id: str,
        vote: Vote,
        reason: str | None,
        correction: str | None,
        *,
        author: str | None = None,
        scope: str | None = None,
        domains: frozenset[str] | None = None,
    ) -> None:
        """On a turn, which must be of `scope` and of one of the `domains` if given. Raises UnknownTurnError."""
        known = select(turns.c.id).join(conversations).where(turns.c.id == turn_id)
        if scope is not None:
            known = known.where(conversations.c.scope == scope)
        if domains is not None:
            known = known.where(turns.c.domain.in_(domains))
        values = {"turn_id": turn_id, "vote": vote, "reason": reason, "correction": correction, "author": author}
        async with self._database.writing() as connection:
            if (await connection.execute(known)).one_or_none() is None:
                raise UnknownTurnError(f"no turn {turn_id!r} is logged; give the turn_id of an answer")
            # The turn first: who votes on it at the same time waits for it, and the later number has the last word.
            await connection.execute(update(turns).where(turns.c.id == turn_id).values(vote=vote))
            await connection.execute(insert(feedback).values(**values, created_at=datetime.now(UTC)))

    async def add_shadow(self, shadow: ShadowAnswer) -> None:
        """Of a logged turn; a second one of the same turn is refused by the database."""
        async with self._database.writing() as connection:
            await connection.execute(insert(shadow_answers).values(**asdict(shadow), created_at=datetime.now(UTC)))


async def _claimed(connection: AsyncConnection, conversation_id: str) -> ConversationState:
    row = (await connection.execute(_CLAIM, {"conversation_id": conversation_id})).one_or_none()
    if row is None:
        raise UnknownConversationError(f"no conversation {conversation_id!r} is logged")
    return ConversationState(*row)


def _new_conversation(
    id_: str,
    caller: Caller,
    given_id: str,
    channel: Channel = "api",
    domain: str | None = None,
    metadata: Mapping[str, str] | None = None,
    fence: int = 1,
) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "id": id_,
        "key": _key(caller, given_id),
        "scope": caller.scope,
        "person": caller.person,
        "channel": channel,
        "domain": domain,
        "is_domain_fixed": domain is not None,
        "fence": fence,
        "metadata": dict(metadata or {}),
        "created_at": now,
        "updated_at": now,
    }


def _key(caller: Caller, given_id: str) -> str:
    # With its length, so that no slash in a person's name can make them another.
    return f"{caller.scope}/{len(caller.person or '')}:{caller.person or ''}/{given_id}"


async def _is_taken(connection: AsyncConnection, id_: str) -> bool:
    return (await connection.execute(select(conversations.c.id).where(conversations.c.id == id_))).one_or_none() is not None
