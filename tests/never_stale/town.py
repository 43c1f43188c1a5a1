"""Services, publishers and a Redis of their own, all on one data folder, and clients that ask all the while."""

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from bot.answering import with_brief
from bot.engine.request import GenerationRequest, PromptRef, SamplingParams
from bot.engine.torch_engine import TorchEngine
from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Message
from prompt_bank.pointers import PointerTable
from prompt_bank.store import FolderStore
from prompt_bank.version import ServedModel
from tests.bot.engine.tools import TOLERANCE
from tests.bot.service import RunningService, running_service
from tests.never_stale.checker import Change, Truth, Turn
from tests.never_stale.publisher import DOMAIN, model_argument
from tests.own_redis import OwnRedis

MAX_TOKENS = 12
QUESTIONS = ("What is my balance?", "And the day before?", "Why is that so?")
_NUM_CLIENTS = 4
_LEASE_NS = 15 * 10**9
_ROOT = Path(__file__).parents[2]


@dataclass
class Heard:
    """What the clients of one run were told. `outages` are spans in which Redis was away."""

    turns: list[Turn] = field(default_factory=list)
    messages: dict[str, list[Message]] = field(default_factory=dict)
    refused: list[tuple[int, int]] = field(default_factory=list)
    outages: list[tuple[int, int]] = field(default_factory=list)

    def is_in_outage(self, since_ns: int, until_ns: int) -> bool:
        return any(since_ns <= back and gone <= until_ns for gone, back in self.outages)


class Town:
    """`services[0]` refuses while Redis is away, `services[1]` serves what it knows."""

    def __init__(self, services: list[RunningService], workers: list["subprocess.Popen[str]"], redis: OwnRedis, data_dir: Path):
        self.services = services
        self._workers = workers
        self.redis = redis
        self._data_dir = data_dir
        self.store = FolderStore(data_dir / "bank")

    @property
    def table_key(self) -> str:
        return f"frontdesk:{self.store.id}:pointers"

    async def run(
        self, seconds: float, disturb: Callable[["Town", Heard], Awaitable[None]] | None = None, is_doomed: bool = True
    ) -> Heard:
        """Publishers publish and clients ask for `seconds`; `disturb` is called meanwhile. In the end all is quiet.

        The doomed publisher leaves changes pending, and while one is, claims look into the store: without it they do not.
        """
        heard = Heard()
        until_ns = time.monotonic_ns() + int(seconds * 1e9)
        workers = self._workers if is_doomed else self._workers[:-1]
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{until_ns}\n")
            worker.stdin.flush()
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            async with asyncio.TaskGroup() as group:
                for number in range(_NUM_CLIENTS):
                    group.create_task(self._keep_asking(http, heard, number, until_ns))
                for worker in workers:
                    group.create_task(asyncio.to_thread(_expect, worker, "done"))
                if disturb is not None:
                    group.create_task(disturb(self, heard))
            for service in (0, 1):
                await self._ask(http, heard, service, f"quiet-{until_ns}-{service}", [])
        return heard

    async def _keep_asking(self, http: httpx.AsyncClient, heard: Heard, client: int, until_ns: int) -> None:
        """Conversations whose turns go to one service and the other in turn."""
        number = client
        while time.monotonic_ns() < until_ns:
            earlier: list[Message] = []
            conversation = f"{until_ns}-{number}"
            for turn in range(len(QUESTIONS)):
                while (answer := await self._ask(http, heard, (number + turn) % 2, conversation, earlier)) is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                earlier = [*earlier, Message(role="user", content=QUESTIONS[turn]), Message(role="assistant", content=answer)]
            number += _NUM_CLIENTS + 1  # the next one begins at the other service

    async def _ask(
        self, http: httpx.AsyncClient, heard: Heard, service: int, conversation: str, earlier: Sequence[Message]
    ) -> str | None:
        """The answer to the next question; None when it was refused."""
        messages = [*earlier, Message(role="user", content=QUESTIONS[len(earlier) // 2])]
        body = {
            "model": DOMAIN,
            "messages": [message.model_dump(include={"role", "content"}) for message in messages],
            "metadata": {"conversation_id": conversation},
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "repetition_penalty": 1,
            "stream": True,
        }
        sent_ns, started_ns, told, text = time.monotonic_ns(), 0, [], ""
        async with http.stream("POST", f"{self.services[service].url}/v1/chat/completions", json=body) as answer:
            if answer.status_code == 503:
                heard.refused.append((sent_ns, time.monotonic_ns()))
                return None
            if answer.status_code == 409 and heard.is_in_outage(sent_ns - _LEASE_NS, time.monotonic_ns()):
                return None  # Redis came back with the lease of a turn that ended meanwhile
            assert answer.status_code == 200, (await answer.aread()).decode()
            async for line in answer.aiter_lines():
                if not line or line == "data: [DONE]":
                    continue
                started_ns = started_ns or time.monotonic_ns()
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                if "frontdesk" in chunk:
                    told.append(chunk["frontdesk"])
                text += chunk["choices"][0]["delta"].get("content", "")
        first, last = told
        turn = Turn(
            id=first["turn_id"],
            conversation=conversation,
            sent_ns=sent_ns,
            started_ns=started_ns,
            version=first["version"],
            digest=first["digest"],
            last_version=last["version"],
            last_digest=last["digest"],
            text=text,
            is_excused=service == 1 and heard.is_in_outage(sent_ns, started_ns),
        )
        heard.turns.append(turn)
        heard.messages[turn.id] = messages
        return text

    def changes(self, fingerprint: str) -> list[Change]:
        """The store's record of what was live when, with the publishers' times."""
        times: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for record in self._records():
            times[record["reason"]][record["event"]] = record
        changes, table = [], PointerTable()
        for change in self.store.changes():
            table = table.with_change(change)
            live = table.pointers(DOMAIN, fingerprint).live
            if change.actor == "frontdesk":
                began_ns = returned_ns = 0  # the starters: before all
            else:
                known = times.pop(change.reason)
                began_ns = known["began"]["at_ns"]
                returned_ns = known["ended"]["at_ns"] if "ended" in known else None
                assert "ended" not in known or known["ended"]["epoch"] == table.epoch
            if live is not None:
                changes.append(Change(table.epoch, live, began_ns, returned_ns))
        lost = [reason for reason, known in times.items() if "ended" in known]
        assert not lost, f"these returned and are not in the store: {lost}"
        return changes

    def statuses(self) -> list[int]:
        """Wait statuses of the doomed publisher's children."""
        return [record["status"] for record in self._records() if record["event"] == "child"]

    def committed_by_killed(self) -> list[str]:
        """The reasons of changes that are in the store and whose author was killed before they returned."""
        records = self._records()
        killed = {record["reason"] for record in records if record["event"] == "child" and record["status"] == signal.SIGKILL}
        ended = {record["reason"] for record in records if record["event"] == "ended"}
        return [change.reason for change in self.store.changes() if change.reason in killed - ended]

    def _records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._data_dir / "records.jsonl").read_text().splitlines()]

    async def truths(self, heard: Heard, base: BaseModel, model: ServedModel) -> dict[str, Truth]:
        """What each turn must say: computed here, each answer alone in its batch."""
        with closing(sqlite3.connect(self._data_dir / "conversations.db")) as database:
            logged = {id_: tuple(rest) for id_, *rest in database.execute("SELECT id, version, digest, answer FROM turns")}
        chat_format = ChatFormat(base.tokenizer)
        answers: dict[tuple[int, str], frozenset[str]] = {}
        truths = {}
        async with TorchEngine(base, num_rows=1) as engine:
            for turn in heard.turns:
                version = self.store.read_version(DOMAIN, turn.version)
                messages = heard.messages[turn.id]
                key = (turn.version, repr(messages))
                if key not in answers:
                    prompt = self.store.read_soft_prompt(version, model) if version.digest else None
                    rendered = chat_format.render(messages if prompt else with_brief(messages, version.card.brief), 500)
                    assert not rendered.num_dropped_messages
                    request = GenerationRequest(
                        token_ids=rendered.token_ids,
                        max_tokens=MAX_TOKENS,
                        prompt=PromptRef.of(prompt) if prompt else None,
                        sampling=SamplingParams(temperature=0),
                        stop_token_ids=base.stop_token_ids,
                    )
                    likeliest = await all_likeliest(engine, request)
                    answers[key] = frozenset(chat_format.decode(token_ids) for token_ids in likeliest)
                truths[turn.id] = Truth(version.digest, answers[key], logged.get(turn.id))
        return truths


class _Steered:
    """A logits processor: first `forced`, then the likeliest token; keeps the ways that are as likely but for rounding."""

    def __init__(self, num_prompt_tokens: int, forced: list[int]) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._forced = forced
        self.other_ways: list[list[int]] = []

    def __call__(self, text_ids: Sequence[int], logits: Tensor) -> Tensor:
        generated = list(text_ids[self._num_prompt_tokens :])
        if len(generated) < len(self._forced):
            return torch.full_like(logits, -torch.inf).index_fill(-1, torch.tensor([self._forced[len(generated)]]), 0.0)
        as_likely = torch.nonzero(logits >= logits.max() - TOLERANCE).flatten().tolist()
        self.other_ways += [[*generated, token] for token in as_likely if token != logits.argmax()]
        return logits


async def all_likeliest(engine: TorchEngine, request: GenerationRequest) -> list[list[int]]:
    """The greedy answer, and what it can be in another batch, where logits are off by rounding."""
    answers, ways = [], [list[int]()]
    while ways:
        steered = _Steered(len(request.token_ids), ways.pop())
        steps = engine.generate(replace(request, logits_processors=[steered]))
        answers.append([token.token_id async for token in steps])
        ways += steered.other_ways
    return answers


def _expect(worker: "subprocess.Popen[str]", word: str) -> None:
    assert worker.stdout is not None
    said = worker.stdout.readline()
    assert said == f"{word}\n", f"a publisher said {said!r}, expected {word!r}"


@contextmanager
def running_town(folder: Path, tiny_model_dir: Path, models_dir: Path, model: ServedModel) -> Iterator[Town]:
    """Two services, two publishers and one whose children are killed. Ended in good order, and their exit statuses checked."""
    data_dir = folder / "data"
    redis = OwnRedis(folder)
    settings = {
        "FRONTDESK_BASE_MODEL": str(tiny_model_dir),
        "FRONTDESK_DTYPE": "float32",
        "FRONTDESK_DATA_DIR": str(data_dir),
        "FRONTDESK_REDIS_URL": redis.url,
        "FRONTDESK_LEASE_S": f"{_LEASE_NS / 10**9}",
        "FRONTDESK_REDIS_TIMEOUT_S": "10",  # only a Redis that is gone is away, not a busy machine's
    }
    whens = ("refuse", "serve_last_known")
    workers = []
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        stack.callback(redis.kill)
        redis.start()
        for arguments in (["ann"], ["bob"], ["carl", "doomed"]):
            name, *more = arguments
            command = [sys.executable, "-m", "tests.never_stale.publisher", name, str(data_dir), redis.url]
            command += [str(data_dir / "records.jsonl"), model_argument(model), *more]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
            stack.callback(worker.kill)
            workers.append(worker)
        contexts = [
            running_service(models_dir, folder / when, **settings, FRONTDESK_WHEN_REDIS_IS_DOWN=when)  # each its own log file
            for when in whens
        ]
        services = list(pool.map(stack.enter_context, contexts))
        list(pool.map(lambda worker: _expect(worker, "ready"), workers))
        yield Town(services, workers, redis, data_dir)
        for worker in workers:
            worker.communicate(timeout=30)
            assert worker.returncode == 0
