"""Processes that end, in good order or not, and a database that goes away: what they leave is answered by the others."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import pytest

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from tests.bot.service import environment
from tests.inbox_faults.checker import NumTokens
from tests.inbox_faults.looking import prompt_tokens
from tests.inbox_faults.town import TIMEOUT_S, Town, running_town, settings
from tests.own_postgresql import OwnPostgresql

LONG = 1500  # tokens: some seconds
NEVER_S = "600"  # a lease of which a test does not see the end


@pytest.fixture
def num_tokens(tiny: BaseModel) -> NumTokens:
    return prompt_tokens(ChatFormat(tiny.tokenizer))


async def test_sigterm_leaves_to_the_other_process_what_it_cannot_finish(
    tiny_model_dir: Path, models_dir: Path, tmp_path: Path, num_tokens: NumTokens
) -> None:
    more = {"FRONTDESK_LEASE_S": NEVER_S, "FRONTDESK_DRAIN_S": "0.5", "FRONTDESK_MAX_BATCH": "2"}
    with running_town(tmp_path, tiny_model_dir, models_dir, **more) as town:
        conversations = [await town.begin(number % 2) for number in range(4)]
        longs = [await town.say(number % 2, id_, "Tell me everything", LONG) for number, id_ in enumerate(conversations)]
        for number, conversation in enumerate(conversations):
            await town.say(number % 2, conversation, "And now?")
        for long in longs:  # all four are under way, two in each
            async with asyncio.timeout(TIMEOUT_S), aclosing(town.follow(0, long)) as events:
                await anext(events)
        stopping = town.services[1]
        async with (
            town.http(1) as http,
            http.stream("GET", f"/v1/conversations/{conversations[0]}/events", params={"after": "0"}) as followed,
        ):
            lines = followed.aiter_lines()
            await anext(lines)
            assert await asyncio.to_thread(stopping.stop) == 0
            assert [line async for line in lines][-1] == ""  # in good order: its client goes on at another process
        log = stopping.log_file.read_text()
        assert "stopped with 2 answers cut short, which go back to the inbox" in log
        assert "Traceback" not in log
        await town.check(num_tokens)


@contextmanager
def doomed_worker(folder: Path, models_dir: Path, given: dict[str, str]) -> Iterator[Path]:
    """Gives the file of its stderr; ended in good order."""
    log_file = folder / "doomed.log"
    command = [sys.executable, "-m", "tests.inbox_faults.doomed_worker", "40"]
    with log_file.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            env=environment(models_dir, folder / "data", given),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=Path(__file__).parents[2],
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", log_file.read_text()
        yield log_file
        process.communicate(timeout=60)
        assert process.returncode == 0, log_file.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
async def test_messages_of_a_process_whose_engine_died_are_answered_by_the_other(
    tiny_model_dir: Path, models_dir: Path, tmp_path: Path, num_tokens: NumTokens
) -> None:
    more = {"FRONTDESK_LEASE_S": NEVER_S, "FRONTDESK_MAX_BATCH": "2"}
    with (
        running_town(tmp_path, tiny_model_dir, models_dir, num_services=1, **more) as town,
        doomed_worker(tmp_path, models_dir, settings(tmp_path, tiny_model_dir, town.redis, **more)) as log_file,
    ):
        conversations = [await town.begin() for _ in range(6)]
        for text in ("Where is my card?", "And where was it the day before?"):
            for conversation in conversations:
                await town.say(0, conversation, text, 60)
        await town.check(num_tokens)
        log = log_file.read_text()
        assert "RuntimeError: the engine thread dies" in log
        num_given_back = log.count("is tried again: the engine was stopped")
        assert 1 <= num_given_back <= 2  # once for each of its slots: it claims no more


@pytest.mark.slow
async def test_a_database_that_goes_away_and_a_service_that_is_killed(
    tiny_model_dir: Path, models_dir: Path, tmp_path: Path, num_tokens: NumTokens
) -> None:
    database = OwnPostgresql(tmp_path)
    try:
        with running_town(
            tmp_path, tiny_model_dir, models_dir, database.url, FRONTDESK_LEASE_S="1", FRONTDESK_MAX_BATCH="4"
        ) as town:
            conversations = [await town.begin(number % 2) for number in range(4)]
            await all_say(town, conversations, "Where is my card?")
            await town.answering()
            database.stop()
            await asyncio.sleep(2)  # long enough for every message to be tried in vain
            async with town.http(0) as http:
                assert (await http.get(f"/v1/conversations/{conversations[0]}")).status_code == 503
            database.start()
            await town.check(num_tokens)
            await all_say(town, conversations, "And where was it the day before?")
            await town.answering()
            await cut_connections(database.url)
            await town.check(num_tokens)
            await all_say(town, conversations, "What did I ask you first?")
            killed = town.services[0].process
            killed.send_signal(signal.SIGKILL)
            assert await asyncio.to_thread(killed.wait, 60) == -signal.SIGKILL
            await town.check(num_tokens)
    finally:
        database.close()


async def all_say(town: Town, conversations: list[str], text: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    for conversation in conversations:
        while (await town.post(0, conversation, text, 100)).status_code == 503:  # its pool meets what was cut
            assert time.monotonic() < deadline


async def cut_connections(url: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(url)
    try:
        await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    finally:
        await connection.close()
