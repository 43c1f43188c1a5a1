"""A process whose children answer messages and die at every step of it; it lets another go on and checks what is left.

It is a process of its own because it forks, which wants one thread. What the outside can see (Redis and the log) is the same
before most steps as one step earlier: a survey finds the others, and the children die there, and at some more. Prints one JSON
object: what state the first message was left in how often, and all that was wrong.

`killed_worker.py FOLDER REDIS_URL MODEL_DIR MODELS_DIR EVERY`: beside the steps of the survey, every so many are taken.
"""

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path

import torch
from redis import Redis

import bot
from bot.answering import Answerer
from bot.app import torch_engine
from bot.chat import Chat
from bot.conversations.database import open_database, sqlite_url
from bot.conversations.events import Events
from bot.conversations.inbox import Inbox, InboxMessage
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.conversations.records import Caller
from bot.routing.encoder import Encoder
from bot.routing.live import LiveRouter
from bot.settings import Settings
from bot.shadow import Shadows
from bot.telemetry import Telemetry
from bot.worker import Worker
from prompt_bank.opening import load_model, open_bank
from prompt_bank.starter import install_starters
from prompt_bank.store import FolderStore
from tests.inbox_faults.checker import Asked, check
from tests.inbox_faults.looking import DOMAIN, left_over, logged, prompt_tokens
from tests.killing import at_every_step, die_at

_BOT = Path(bot.__file__).parent
# The turn's own code. The engine's thread and what hears wake-ups run beside it, and would make steps differ from run to run.
_WATCHED = tuple(
    str(_BOT / name)
    for name in (
        "worker.py",
        "chat.py",
        "answering.py",
        "telling.py",
        "turn_events.py",
        "conversations/inbox.py",
        "conversations/log.py",
    )
)
_LEASE_S = 600.0  # ends when this process says so
_TIMEOUT_S = 60.0
_ANSWER = {"domain": DOMAIN, "overrides": {"max_tokens": 3, "temperature": 0}}
STATES = ("waiting", "leased", "fenced", "started", "streaming", "logged", "told", "finished")  # of the first message
_QUESTIONS = ("Where is my card?", "And why is it gone since the day before yesterday?")


class Killer:
    """Forks children that answer the messages of one conversation and die at one step."""

    def __init__(self, folder: Path, redis_url: str, model_dir: Path, models_dir: Path) -> None:
        self._folder = folder
        self._database = folder / "data" / "conversations.db"
        self._settings = Settings(
            data_dir=folder / "data",
            redis_url=redis_url,
            redis_timeout_s=10,
            base_model=str(model_dir),
            models_dir=models_dir,
            dtype="float32",
            max_batch=2,
        )
        self._redis = Redis.from_url(redis_url)
        self._loaded = load_model(self._settings)
        self._num_tokens = prompt_tokens(self._loaded.chat_format)
        self._encoder = Encoder.from_models_dir(models_dir)
        self._asked: list[Asked] = []
        asyncio.run(self._prepare())
        self._prefix = f"frontdesk:{FolderStore(folder / 'data' / 'bank').id}:"
        shutil.copy(self._database, folder / "empty.db")

    async def _prepare(self) -> None:
        """The bank, and a log with one conversation."""
        async with open_bank(self._settings) as bank, open_database(sqlite_url(self._database)) as database:
            await install_starters(bank, self._loaded.served)
            state = await ConversationLog(database).create(Caller("test"), domain=DOMAIN)
        assert state is not None
        self._asked = [Asked(f"m{number}", state.id, text) for number, text in enumerate(_QUESTIONS)]

    @asynccontextmanager
    async def _parts(self) -> AsyncIterator[Worker]:
        """As the service composes them, on models that are loaded already."""
        loaded, settings = self._loaded, self._settings
        async with (
            open_bank(settings) as bank,
            open_database(settings.log_url) as database,
            torch_engine(loaded, settings) as engine,
        ):
            log, reader = ConversationLog(database), LogReader(database)
            inbox = Inbox(bank.cache.redis, bank.cache.prefix, bank.cache.table_key, lease_s=_LEASE_S)
            events = Events(bank.cache.redis, bank.cache.prefix)
            answerer = Answerer(bank, engine, loaded.served, loaded.chat_format, loaded.base.stop_token_ids)
            telemetry = Telemetry(engine.stats, bank.read_stats)
            shadows = Shadows(answerer, log, telemetry, engine.is_half_idle)
            router = LiveRouter(bank, self._encoder)
            chat = Chat(bank, answerer, router, log, inbox, telemetry, shadows, loaded.served)
            worker = Worker(bank, chat, inbox, events, log, reader, num_slots=1, can_answer=lambda: engine.is_running)
            async with events.listening():
                yield worker
            await chat.close()

    def kill_everywhere(self, every: int) -> dict[str, object]:
        """Kills at every step before which Redis or the log are not what they were, at some others, and at none."""
        self._reset()
        num_steps, changing = self._survey()
        seen: Counter[str] = Counter()
        problems: list[str] = []
        for step in sorted({*changing, *range(1, num_steps, every)}):
            status, state, found = self._killed(lambda at=step: die_at(at, code=_WATCHED))  # type: ignore[misc]
            seen[state] += 1
            if status == 0 and step < num_steps * 0.9:  # the last steps are not the same in every run
                problems.append(f"step {step} of {num_steps}: not killed")
            problems += [f"step {step}, {state}: {problem}" for problem in found]
        for wanted in STATES:  # some last a step or two, and not the same ones in every run
            if not seen[wanted]:
                _, state, found = self._killed(lambda at=wanted: at_every_step(partial(self._die_in, at), code=_WATCHED))  # type: ignore[misc]
                seen[state] += 1
                problems += [f"in state {wanted}, {state}: {problem}" for problem in found]
        return {"num_steps": num_steps, "num_states": len(changing), "seen": seen, "problems": problems}

    def _killed(self, watch: Callable[[], None]) -> tuple[int, str, list[str]]:
        """The child's wait status, how far the first message got, and what is wrong once another has gone on."""
        self._reset()
        status = self._in_child(watch)
        state = self._state()
        self._end_leases()
        return status, state, asyncio.run(self._go_on())

    def _die_in(self, state: str, _: int) -> None:
        if self._state() == state:
            os.kill(os.getpid(), signal.SIGKILL)

    def _reset(self) -> None:
        self._redis.flushdb()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._database}{suffix}").unlink(missing_ok=True)
        shutil.copy(self._folder / "empty.db", self._database)
        asyncio.run(self._put())

    async def _put(self) -> None:
        async with open_bank(self._settings) as bank:
            inbox = Inbox(bank.cache.redis, bank.cache.prefix, bank.cache.table_key)
            for one in self._asked:
                assert await inbox.put(InboxMessage(one.id, one.conversation, one.text, time.time(), _ANSWER))

    def _survey(self) -> tuple[int, list[int]]:
        """How many steps the answers take, and before which of them the outside is another than a step earlier."""
        changing: list[int] = []
        num_steps = 0
        before = None
        record = self._folder / "survey.json"

        def look(step: int) -> None:
            nonlocal before, num_steps
            num_steps = step
            outside = self._outside()
            if outside != before:
                changing.append(step)
                before = outside

        status = self._in_child(
            lambda: at_every_step(look, code=_WATCHED), lambda: record.write_text(json.dumps([num_steps, changing]))
        )
        assert status == 0, f"the survey failed with wait status {status}"
        num_steps, changing = json.loads(record.read_text())
        return num_steps, changing

    def _outside(self) -> list[object]:
        with closing(sqlite3.connect(self._database)) as database:
            rows = database.execute("SELECT fence, (SELECT count(*) FROM turns) FROM conversations").fetchall()
        return [rows, *((key, self._redis.dump(key)) for key in sorted(self._redis.scan_iter()))]

    def _in_child(self, watch: Callable[[], None], finish: Callable[[], object] = lambda: None) -> int:
        """Answers in a child that `watch` has been called in, and gives its wait status: 0, or killed."""
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join()  # what it holds, nobody would let go of in the child
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio.run(self._answer_all(watch))
                finish()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"the child failed with wait status {status}"
        return status

    async def _answer_all(self, watch: Callable[[], None] = lambda: None) -> None:
        async with self._parts() as worker:
            watch()
            async with worker.running(drain_s=_TIMEOUT_S), asyncio.timeout(_TIMEOUT_S):
                while left_over(self._redis, self._prefix):  # noqa: ASYNC110  by other code than the worker's
                    await asyncio.sleep(0.02)
            sys.settrace(None)

    def _state(self) -> str:
        """How far the first message got."""
        conversation, message = self._asked[0].conversation, self._asked[0].id
        with closing(sqlite3.connect(self._database)) as database:
            is_logged = database.execute("SELECT 1 FROM turns WHERE message_id = ?", (message,)).fetchone()
            (fence,) = database.execute("SELECT fence FROM conversations").fetchone()
        entries = self._redis.xrange(f"{self._prefix}events:{conversation}")
        told = [event["type"] for _, fields in entries if (event := json.loads(fields[b"event"]))["message_id"] == message]
        head = self._redis.lindex(f"{self._prefix}inbox:{conversation}", 0) or b""
        if not head.startswith(message.encode()):
            return "finished"
        if is_logged:
            return "told" if "turn.completed" in told else "logged"
        if told:
            return "streaming" if "turn.delta" in told else "started"
        is_leased = self._redis.zscore(f"{self._prefix}leases", conversation) is not None
        return "fenced" if fence > 1 else "leased" if is_leased else "waiting"

    def _end_leases(self) -> None:
        """As time does."""
        for conversation in self._redis.zrange(f"{self._prefix}leases", 0, -1):
            self._redis.zadd(f"{self._prefix}leases", {conversation: 0})

    async def _go_on(self) -> list[str]:
        """This process answers what is left; gives all that is wrong then."""
        await self._answer_all()
        left = left_over(self._redis, self._prefix)
        problems = [f"{left} is left"] if left else []
        return problems + check(self._asked, await logged(self._settings.log_url), self._num_tokens)


def main() -> None:
    folder, redis_url, model_dir, models_dir, every = sys.argv[1:6]
    torch.set_num_threads(1)  # the threads of a parent are not there in its children
    killer = Killer(Path(folder), redis_url, Path(model_dir), Path(models_dir))
    print(json.dumps(killer.kill_everywhere(int(every))))


if __name__ == "__main__":
    main()
