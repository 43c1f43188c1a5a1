"""The worker beside a service: it says when it cannot claim, and goes on."""

import asyncio
from pathlib import Path

import httpx
import pytest
from redis import Redis

from prompt_bank.store import FolderStore
from tests.bot.conftest import ServingHere


async def test_an_unexpected_error_of_a_claim_is_told_and_does_not_end_the_worker(
    serving_here: ServingHere, redis_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_here(redis_url=redis_url) as http:
        id_ = (await http.post("/v1/conversations", json={"domain": "banking"})).json()["id"]
        assert (await http.get("/readyz")).json()["inbox"] == "ok"
        prefix = f"frontdesk:{FolderStore(tmp_path / 'data' / 'bank').id}:"
        with Redis.from_url(redis_url) as client, client.pipeline() as together:
            for number in range(5):  # as something else would write them that has our keys
                together.rpush(f"{prefix}inbox:broken-{number}", "no message at all")
                together.zadd(f"{prefix}ready", {f"broken-{number}": number})
            together.publish(f"{prefix}wakeups", '["ready"]')
            together.execute()
        ready = await readyz_until(http, 503)
        assert ready["inbox"] == "ValueError"
        assert "nothing is claimed from the inbox, trying again" in caplog.text
        body = {"text": "I lost my card", "max_tokens": 3}
        assert (await http.post(f"/v1/conversations/{id_}/messages", json=body)).status_code == 200
        assert (await readyz_until(http, 200))["inbox"] == "ok"


async def readyz_until(http: httpx.AsyncClient, status: int) -> dict[str, str]:
    async with asyncio.timeout(60):
        while (ready := await http.get("/readyz")).status_code != status:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    checks: dict[str, str] = ready.json()
    return checks
