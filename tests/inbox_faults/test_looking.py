"""What looks from outside sees what is there to be seen."""

import pytest
from redis import Redis

from bot.conversations.inbox import Inbox
from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Message
from tests.bot.conversations.conftest import PREFIX as PREFIX
from tests.bot.conversations.conftest import inbox, make_inbox, message, redis
from tests.inbox_faults.looking import left_over, prompt_tokens

__all__ = ["inbox", "make_inbox", "redis"]  # fixtures of the inbox's tests


async def test_whatever_an_inbox_still_holds_is_seen(inbox: Inbox, redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        assert left_over(client, PREFIX) == []
        await inbox.put(message("m1"))
        assert left_over(client, PREFIX) == ["ready", "inbox:c1", "queued 1"]
        claim, _ = await inbox.claim()
        assert claim is not None
        assert left_over(client, PREFIX) == ["leases", "owners", "deliveries", "inbox:c1", "queued 1"]
        await inbox.release(claim, after_s=600)
        assert left_over(client, PREFIX) == ["leases", "deliveries", "inbox:c1", "queued 1"]
        claim = await inbox.claim_conversation("c2")  # type: ignore[assignment]
        assert claim is not None
        assert left_over(client, PREFIX) == ["leases", "owners", "deliveries", "inbox:c1", "queued 1"]


def test_a_prompt_tells_how_many_turns_and_which_version_it_was_made_of(tiny: BaseModel) -> None:
    num_tokens = prompt_tokens(ChatFormat(tiny.tokenizer), {2: "Be another clerk."})
    turn = [Message(role="user", content="Hello"), Message(role="assistant", content="Hi")]
    counts = {num_tokens([*turn * number, turn[0]], version) for number in range(4) for version in (1, 2)}
    assert len(counts) == 8
    with pytest.raises(KeyError):
        num_tokens(turn[:1], 3)
