"""A process frozen past its lease, a Redis that is killed or full, and a crowd: two services that nobody has to restart."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.opening import open_bank
from prompt_bank.settings import BankSettings
from prompt_bank.version import Draft, ServedModel
from tests.inbox_faults.checker import Asked, NumTokens, check_heard
from tests.inbox_faults.looking import DOMAIN, prompt_tokens
from tests.inbox_faults.town import TIMEOUT_S, Town, running_town

LONG = 1000  # tokens: some seconds


@pytest.fixture(scope="module")
def running(tiny_model_dir: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    folder = tmp_path_factory.mktemp("town")
    with running_town(folder, tiny_model_dir, models_dir, FRONTDESK_LEASE_S="1", FRONTDESK_MAX_BATCH="4") as town:
        yield town


@pytest.fixture
def num_tokens(tiny: BaseModel) -> NumTokens:
    return prompt_tokens(ChatFormat(tiny.tokenizer))


@pytest.fixture
async def town(running: Town) -> AsyncIterator[Town]:
    """Quiet before and after."""
    yield running
    await running.quiet()


async def until_logged(path: Path, text: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while text not in path.read_text():  # noqa: ASYNC240
        assert time.monotonic() < deadline, f"{text!r} is not in the log"
        await asyncio.sleep(0.05)


async def test_a_worker_frozen_past_its_lease_writes_nothing_more(town: Town, num_tokens: NumTokens) -> None:
    conversation = await town.begin()
    long = await town.say(0, conversation, "Tell me everything about my account, please", LONG)
    short = await town.say(1, conversation, "And now?")
    frozen = await town.answering()
    other = 1 - frozen
    heard: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(TIMEOUT_S), aclosing(town.follow(other, long)) as events:
            async for _, event in events:
                heard.append(event)
                if event["type"] == "turn.delta" and sum(one["type"] == "turn.delta" for one in heard) == 1:
                    town.services[frozen].process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(TIMEOUT_S), aclosing(town.follow(other, short)) as events:
            assert [event["type"] async for _, event in events][-1] == "turn.completed"
    finally:
        town.services[frozen].process.send_signal(signal.SIGCONT)
    assert [event["type"] for event in heard].count("turn.started") == 2
    refusal = f"the lease of {conversation} ended while message {long.id} was answered"
    await until_logged(town.services[frozen].log_file, refusal)
    turns = await town.check(num_tokens)
    assert check_heard(heard, turns[long.id]) == []
    assert refusal not in town.services[other].log_file.read_text()


async def test_redis_is_killed_in_the_middle_of_turns(town: Town, num_tokens: NumTokens) -> None:
    conversations = [await town.begin(number % 2) for number in range(4)]
    for text in ("Where is my card?", "And where was it the day before?"):
        for number, conversation in enumerate(conversations):
            await town.say(number % 2, conversation, text, LONG // 5)
    for _ in range(2):
        await town.answering()
        town.redis.kill()
        for service in (0, 1):
            refused = await town.post(service, conversations[0], "Refused")
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
        town.redis.start()
    await town.check(num_tokens)
    await town.say(0, conversations[0], "Are you there again?")
    await town.check(num_tokens)


async def test_a_full_redis_refuses_what_is_new_and_works_off_what_is_there(town: Town, num_tokens: NumTokens) -> None:
    client = town.redis.client
    conversations = [await town.begin(number % 2) for number in range(4)]
    for text in ("Where is my card?", "And where was it the day before?"):
        for number, conversation in enumerate(conversations):
            await town.say(number % 2, conversation, text, LONG // 5)
    client.config_set("maxmemory", client.info("memory")["used_memory"])
    try:
        for service in (0, 1):
            refused = await town.post(service, conversations[0], "Refused " * 2000)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "InboxFullError"
            assert int(refused.headers["Retry-After"]) > 0
        await town.quiet()
        assert (await town.post(0, conversations[0], "Refused " * 2000)).status_code == 503  # full to the end
    finally:
        client.config_set("maxmemory", 0)
    await town.say(0, conversations[0], "Have you room again?")
    await town.check(num_tokens)


async def test_a_crowd_is_answered_in_order_and_followed_from_either_process(
    town: Town, num_tokens: NumTokens, tiny: BaseModel, tiny_served: ServedModel
) -> None:
    brief = "You are another clerk. Be brief."
    latest: list[Asked] = []

    async def promote() -> None:
        bank_settings = BankSettings(data_dir=town.data_dir, redis_url=town.redis.url, redis_timeout_s=10)
        async with open_bank(bank_settings) as bank:
            card = (await bank.live(DOMAIN, tiny_served)).card
            draft = Draft(card.model_copy(update={"brief": brief}), tiny_served)
            version = await bank.publish(draft, "test", "another brief")
            assert version.manifest.version == 2
            await bank.promote(DOMAIN, 2, "test", "another brief")

    async def talk(number: int) -> list[tuple[Asked, list[dict[str, Any]]]]:
        conversation = await town.begin(number % 2)
        asked = [await town.say((number + turn) % 2, conversation, "why? " * (turn + 1), 12) for turn in range(3)]
        if number == 5:
            await promote()
        latest.append(await town.say(number % 2, conversation, "And now, " * (number + 1), 12))
        return [(one, await follow_cut(town, one, number % 2)) for one in [*asked, latest[-1]]]

    talks = await asyncio.gather(*(talk(number) for number in range(10)))
    last = await town.say(0, await town.begin(1), "Who are you now?")
    turns = await town.check(prompt_tokens(ChatFormat(tiny.tokenizer), {2: brief}))
    problems = [problem for talk_ in talks for one, events in talk_ for problem in check_heard(events, turns[one.id])]
    assert problems == []
    by_conversation = [[turns[one.id].version for one, _ in talk_] for talk_ in talks]
    assert by_conversation[5][-1] == turns[last.id].version == 2  # said after the promote had returned
    assert {version for versions in by_conversation for version in versions} <= {1, 2}
    assert all(versions == sorted(versions) for versions in by_conversation)


async def follow_cut(town: Town, asked: Asked, service: int) -> list[dict[str, Any]]:
    """What one is told of a message whose connection is cut after every third event, and who goes on at the other service."""
    heard: list[dict[str, Any]] = []
    place = None
    async with asyncio.timeout(TIMEOUT_S):
        while not heard or heard[-1]["type"] != "turn.completed":
            async with aclosing(town.follow(service, asked, place)) as events:
                for _ in range(3):
                    try:
                        place, event = await anext(events)
                    except StopAsyncIteration:
                        break
                    heard.append(event)
            service = 1 - service
    return heard
