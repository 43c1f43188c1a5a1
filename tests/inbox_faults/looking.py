"""What can be seen of an installation from outside: its log, what its inbox still holds, and what a prompt must have been."""

from collections.abc import Mapping, Sequence

from redis import Redis

from bot.answering import with_brief
from bot.conversations.database import open_database
from bot.conversations.reading import LogReader
from bot.conversations.records import TurnFilter
from prompt_bank.card import read_card
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Message
from prompt_bank.starter import STARTER_DIR
from tests.inbox_faults.checker import Answered, NumTokens

DOMAIN = "banking"
CONTEXT_TOKENS = 8192  # of the tiny model: none of these tests has so long a conversation


async def logged(database_url: str) -> list[Answered]:
    """Every turn, in the log's order."""
    async with open_database(database_url) as database:
        records = await LogReader(database).turns(TurnFilter(), 100_000, descending=False)
    return [
        Answered(
            turn.message_id,
            turn.conversation_id,
            turn.question,
            turn.answer,
            turn.finish_reason,
            turn.num_prompt_tokens,
            turn.version,
        )
        for turn in (record.turn for record in records)
    ]


def left_over(client: Redis, prefix: str) -> list[str]:
    """What an inbox in which all is done must not hold any more."""
    names = ("ready", "leases", "owners", "deliveries", "stopped", "dead")
    left = [name for name in names if client.exists(f"{prefix}{name}")]
    left += [key.decode().removeprefix(prefix) for key in client.scan_iter(f"{prefix}inbox:*")]
    num_queued = int(client.get(f"{prefix}queued") or 0)
    return left + ([f"queued {num_queued}"] if num_queued else [])


def prompt_tokens(chat_format: ChatFormat, later_briefs: Mapping[int, str] | None = None) -> NumTokens:
    """How many tokens the tiny model is given, for which no version has a soft prompt; v1 has the starter card's brief."""
    briefs = {1: read_card(STARTER_DIR / DOMAIN / "card.toml").brief, **(later_briefs or {})}

    def num_tokens(messages: Sequence[Message], version: int | None) -> int:
        assert version is not None
        rendered = chat_format.render(with_brief(messages, briefs[version]), CONTEXT_TOKENS)
        assert not rendered.num_dropped_messages
        return len(rendered.token_ids)

    return num_tokens
