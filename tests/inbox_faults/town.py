"""Two services on one data folder with a Redis of their own, and what their clients say, acknowledge and follow."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from bot.conversations.database import sqlite_url
from prompt_bank.store import FolderStore
from tests.bot.service import RunningService, running_service
from tests.inbox_faults.checker import Answered, Asked, NumTokens, check
from tests.inbox_faults.looking import CONTEXT_TOKENS, DOMAIN, left_over, logged
from tests.own_redis import OwnRedis

TIMEOUT_S = 120.0


def settings(folder: Path, model_dir: Path, redis: OwnRedis, **more: str) -> dict[str, str]:
    return {
        "FRONTDESK_BASE_MODEL": str(model_dir),
        "FRONTDESK_DTYPE": "float32",
        "FRONTDESK_DATA_DIR": str(folder / "data"),
        "FRONTDESK_REDIS_URL": redis.url,
        "FRONTDESK_REDIS_TIMEOUT_S": "10",  # only a Redis that is gone is away, not a busy machine's
        "FRONTDESK_CONTEXT_TOKENS": str(CONTEXT_TOKENS),
        **more,
    }


class Town:
    """`asked` are all messages that were acknowledged, in their order."""

    def __init__(self, services: list[RunningService], redis: OwnRedis, data_dir: Path, database_url: str) -> None:
        self.services = services
        self.redis = redis
        self.data_dir = data_dir
        self.database_url = database_url
        self.asked: list[Asked] = []
        self._places: dict[str, str] = {}
        self._prefix = f"frontdesk:{FolderStore(data_dir / 'bank').id}:"

    async def begin(self, service: int = 0) -> str:
        async with self.http(service) as http:
            created = await http.post("/v1/conversations", json={"domain": DOMAIN})
        assert created.status_code == 201, created.text
        id_: str = created.json()["id"]
        return id_

    def http(self, service: int) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.services[service].url, timeout=TIMEOUT_S, trust_env=False)

    async def post(self, service: int, conversation: str, text: str, max_tokens: int = 3) -> httpx.Response:
        body = {"text": text, "max_tokens": max_tokens, "temperature": 0, "background": True}
        async with self.http(service) as http:
            response = await http.post(f"/v1/conversations/{conversation}/messages", json=body)
        if response.status_code == 202:
            message_id = response.json()["id"]
            self.asked.append(Asked(message_id, conversation, text))
            self._places[message_id] = response.json()["after"]
        return response

    async def say(self, service: int, conversation: str, text: str, max_tokens: int = 3) -> Asked:
        """Acknowledged."""
        response = await self.post(service, conversation, text, max_tokens)
        assert response.status_code == 202, response.text
        return Asked(response.json()["id"], conversation, text)

    async def follow(
        self, service: int, asked: Asked, after: str | None = None
    ) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Ids and events of the message's turn, as EventSource reads them: after `after`, else from its beginning."""
        place = {"Last-Event-ID": after or self._places[asked.id]}
        async with (
            self.http(service) as http,
            http.stream("GET", f"/v1/conversations/{asked.conversation}/events", headers=place) as stream,
        ):
            id_ = ""
            async for line in stream.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    id_ = value
                elif name == "data" and (event := json.loads(value)).get("message_id") == asked.id:
                    yield id_, event
                    if event["type"] in ("turn.completed", "turn.cancelled", "turn.failed"):
                        return

    async def answering(self) -> int:
        """Waits until one of the services decodes, and gives which."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for service in range(len(self.services)):
                    async with self.http(service) as http:
                        if "frontdesk_engine_active 0.0" not in (await http.get("/metrics")).text:
                            return service
                await asyncio.sleep(0.005)

    async def quiet(self) -> None:
        """Waits until the inbox is empty and nobody works."""
        deadline = time.monotonic() + TIMEOUT_S
        while left := left_over(self.redis.client, self._prefix):
            assert time.monotonic() < deadline, f"{left} is left"
            await asyncio.sleep(0.05)

    async def check(self, num_tokens: NumTokens) -> dict[str, Answered]:
        """Waits for all answers, and finds nothing wrong with them; gives them by message."""
        await self.quiet()
        turns = await logged(self.database_url)
        assert check(self.asked, turns, num_tokens) == []
        return {turn.message_id: turn for turn in turns if turn.message_id is not None}


@contextmanager
def own_redis(folder: Path) -> Iterator[OwnRedis]:
    redis = OwnRedis(folder)
    redis.start()
    try:
        yield redis
    finally:
        redis.client.close()
        redis.kill()


@contextmanager
def running_town(
    folder: Path, model_dir: Path, models_dir: Path, database_url: str | None = None, num_services: int = 2, **more: str
) -> Iterator[Town]:
    """Ended in good order, and exit statuses checked, where the test has ended none."""
    data_dir = folder / "data"
    if database_url is not None:
        more["FRONTDESK_DATABASE_URL"] = database_url
    with own_redis(folder) as redis, ExitStack() as stack, ThreadPoolExecutor() as pool:
        given = settings(folder, model_dir, redis, **more)
        contexts = [running_service(models_dir, folder / f"service-{number}", **given) for number in range(num_services)]
        services = list(pool.map(stack.enter_context, contexts))
        yield Town(services, redis, data_dir, database_url or sqlite_url(data_dir / "conversations.db"))
