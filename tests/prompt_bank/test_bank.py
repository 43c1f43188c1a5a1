"""The bank over a real store and a real Valkey: never stale, whatever happens to Redis."""

import asyncio
import logging
import os
import select
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from prompt_bank.bank import Bank
from prompt_bank.cache import RedisCache
from prompt_bank.errors import (
    BaseModelMismatchError,
    PointerConflictError,
    RedisUnavailableError,
    ServiceError,
    SoftPromptError,
    UnknownDomainError,
    UnknownVersionError,
)
from prompt_bank.opening import open_bank
from prompt_bank.settings import BankSettings
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.store import FolderStore, PointerTable
from prompt_bank.valkey import embedded_valkey
from prompt_bank.version import Draft, ServedModel, Version
from tests.prompt_bank.conftest import BankOpener, make_card, make_prompt

TABLE_KEY = "frontdesk:pointers"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator["Redis"]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Starts a Valkey that a test may kill; its data stays in one folder."""
    contexts = []

    def start() -> str:
        context = embedded_valkey(tmp_path / "own_valkey")
        contexts.append(context)
        return context.__enter__()

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


async def publish(bank: Bank, model: ServedModel, seed: int | None = 0, domain: str = "banking") -> Version:
    prompt = None if seed is None else make_prompt(model.shape, seed=seed)
    return await bank.publish(Draft(make_card(domain), model, prompt))


def edit_card(folder: Path, domain: str) -> None:
    (card,) = folder.rglob(f"versions/{domain}/1/card.toml")
    card.write_text(card.read_text(encoding="utf-8") + "# edited", encoding="utf-8")


async def kill_server(url: str) -> None:
    async with Redis.from_url(url) as client:
        pid = int((await client.info("server"))["process_id"])
    ended = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(select.select, [ended], [], [], 10)
    os.close(ended)


async def test_published_version_answers_nobody_until_it_is_promoted(bank: Bank, tiny_served: ServedModel) -> None:
    version = await publish(bank, tiny_served)
    with pytest.raises(UnknownDomainError, match="no domain 'banking' is live; there are: none"):
        await bank.live("banking", tiny_served)
    await bank.promote("banking", 1, "ann", "better")
    assert await bank.live("banking", tiny_served) == version


async def test_promotion_is_seen_at_the_next_claim_by_another_bank(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel
) -> None:
    other = open_bank_at(redis_url)
    await other.start()
    for number in range(1, 6):
        await publish(bank, tiny_served, seed=number)
        await bank.promote("banking", number, "ann", "better")
        assert (await other.live("banking", tiny_served)).manifest.version == number
    await other.promote("banking", 2, "bob", "rolled back")
    assert (await bank.live("banking", tiny_served)).manifest.version == 2
    assert (await bank.claim_table()).change.actor == "bob"  # type: ignore[union-attr]


async def test_a_version_that_cannot_be_read_hides_no_other(
    bank: Bank, tmp_path: Path, tiny_served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    live = {}
    for domain in ("banking", "library"):
        live[domain] = (await publish(bank, tiny_served, domain=domain)).manifest.version
    edit_card(tmp_path, "banking")
    assert list(await bank.cards(live)) == ["library"]
    assert "banking v1 is left out" in caplog.text


async def test_unchanged_table_costs_one_round_trip(bank: Bank, redis: "Redis", tiny_served: ServedModel) -> None:
    await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    await bank.claim_table()
    before = (await redis.info("stats"))["total_commands_processed"]
    await bank.claim_table()
    assert (await redis.info("stats"))["total_commands_processed"] - before == 2  # the claim, and INFO itself


async def test_claims_never_go_back_while_another_bank_promotes_in_a_loop(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel
) -> None:
    reader = open_bank_at(redis_url)
    await reader.start()
    for _ in range(2):
        await publish(bank, tiny_served, seed=None)
    promoted = 0

    async def promote() -> None:
        nonlocal promoted
        for n in range(60):
            promoted = (await bank.promote("banking", n % 2 + 1, "ann", "")).epoch

    async def claim() -> None:
        while promoted < 60:
            expected = promoted
            assert (await reader.claim_table()).epoch >= expected

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(promote())
        for _ in range(3):
            tasks.create_task(claim())


async def test_claim_after_redis_lost_its_data_refills_it_under_a_new_id(
    bank: Bank, redis: "Redis", tiny_served: ServedModel
) -> None:
    version = await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    table, id_ = await bank.claim_table(), await redis.hget(TABLE_KEY, "id")
    await redis.flushall()
    assert await bank.claim_table() == table
    refilled = await redis.hgetall(TABLE_KEY)
    assert refilled[b"id"] != id_
    assert refilled[b"epoch"] == b"1"
    assert await bank.soft_prompt(version, tiny_served) is not None


async def test_redis_set_back_to_an_older_state_is_brought_forward(
    bank: Bank, redis: "Redis", tiny_served: ServedModel
) -> None:
    """A server restored from a snapshot has the same table id and an older epoch: the store counts."""
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    await bank.promote("banking", 1, "ann", "")
    older = await redis.hgetall(TABLE_KEY)
    await bank.promote("banking", 2, "ann", "")
    await bank.claim_table()
    await redis.hset(TABLE_KEY, mapping=older)  # type: ignore[arg-type]
    assert (await bank.live("banking", tiny_served)).manifest.version == 2
    assert await redis.hget(TABLE_KEY, "epoch") == b"2"


async def test_older_table_never_overwrites_a_newer_one(redis: "Redis") -> None:
    cache = RedisCache(redis, blob_ttl_s=60)
    newer = PointerTable(epoch=10, live={"banking": {"f": 2}})
    first = await cache.publish_table(newer)
    for epoch in (9, 10, 2):
        late = await cache.publish_table(PointerTable(epoch=epoch))
        assert late.id == first.id
    assert await cache.table() == (first, newer)
    assert (await cache.publish_table(PointerTable(epoch=11))).id == first.id
    assert (await cache.table_stamp()).epoch == 11  # type: ignore[union-attr]


async def test_start_takes_the_store_s_word_over_a_redis_of_another_past(
    open_bank_at: BankOpener, redis: "Redis", redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await RedisCache(redis, 60).publish_table(PointerTable(epoch=50, live={"gone": {"f": 9}}))
    bank = open_bank_at(redis_url)
    await bank.start()
    assert await bank.claim_table() == PointerTable()
    assert "redis holds pointer epoch 50, the store 0: the store counts" in caplog.text


async def test_start_does_not_undo_a_promotion_that_happens_meanwhile(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    """Were the store read before Redis, a promotion between the two would look like a Redis of another past."""
    await publish(bank, tiny_served, seed=None)
    loop = asyncio.get_running_loop()

    class StoreOfABusyDay(FolderStore):
        def pointer_table(self) -> PointerTable:
            table = super().pointer_table()
            asyncio.run_coroutine_threadsafe(bank.promote("banking", 1, "ann", ""), loop).result(10)
            return table

    await Bank(StoreOfABusyDay(store._versions.parent), RedisCache(redis, 60)).start()
    published = await RedisCache(redis, 60).table()
    assert published is not None
    assert published[1] == store.pointer_table()


async def test_redis_down_refuses_and_recovers(
    own_valkey: Callable[[], str], open_bank_at: BankOpener, tiny_served: ServedModel
) -> None:
    url = own_valkey()
    bank = open_bank_at(url)
    await bank.start()
    await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    table = await bank.claim_table()
    await kill_server(url)
    with pytest.raises(RedisUnavailableError, match="redis does not answer"):
        await bank.claim_table()
    with pytest.raises(RedisUnavailableError, match=r"banking v1 is promoted in the store \(epoch 2\).*promote it again"):
        await bank.promote("banking", 1, "ann", "")
    assert own_valkey() == url
    assert (await bank.claim_table()).live == table.live
    await bank.promote("banking", 1, "ann", "")
    assert (await bank.claim_table()).epoch == 3


async def test_redis_down_serves_the_last_known_table_and_says_so(
    own_valkey: Callable[[], str], open_bank_at: BankOpener, tiny_served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    url = own_valkey()
    bank = open_bank_at(url, "serve_last_known")
    await bank.start()
    version = await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    await bank.claim_table()
    await kill_server(url)
    with caplog.at_level(logging.WARNING):
        assert await bank.live("banking", tiny_served) == version
        assert await bank.soft_prompt(version, tiny_served) is not None  # from the store
    assert "serving the last known pointer table, epoch 1" in caplog.text
    own_valkey()
    await publish(bank, tiny_served, seed=1)
    await bank.promote("banking", 2, "ann", "")
    assert (await bank.live("banking", tiny_served)).manifest.version == 2


async def test_start_without_redis_is_refused_in_either_mode(open_bank_at: BankOpener, tmp_path: Path) -> None:
    for mode in ("refuse", "serve_last_known"):
        with pytest.raises(RedisUnavailableError, match="start it or set FRONTDESK_REDIS_URL"):
            await open_bank_at(f"unix://{tmp_path}/none.sock", mode).start()


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
async def test_redis_that_may_evict_pointers_is_refused_at_start(
    open_bank_at: BankOpener, redis: "Redis", redis_url: str, policy: str
) -> None:
    await redis.config_set("maxmemory-policy", policy)
    try:
        with pytest.raises(ServiceError, match=f"{policy}, which may evict live pointers; set it to volatile-lru"):
            await open_bank_at(redis_url).start()
    finally:
        await redis.config_set("maxmemory-policy", "volatile-lru")


async def test_full_memory_evicts_blobs_and_keeps_the_pointers(bank: Bank, redis: "Redis", tiny_served: ServedModel) -> None:
    await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    published = await redis.hgetall(TABLE_KEY)
    cache = RedisCache(redis, blob_ttl_s=3600)
    used = (await redis.info("memory"))["used_memory"]
    await redis.config_set("maxmemory", used + 3_000_000)
    try:
        prompts = [make_prompt(tiny_served.shape, num_virtual_tokens=1024, seed=seed) for seed in range(12)]
        for prompt in prompts:
            await cache.put_blob(prompt)
        kept = [await cache.get_blob(prompt.digest) is not None for prompt in prompts]
    finally:
        await redis.config_set("maxmemory", "256mb")
    assert 0 < sum(kept) < len(prompts)
    assert await redis.hgetall(TABLE_KEY) == published
    assert await redis.ttl(TABLE_KEY) == -1


async def test_blobs_have_a_ttl_that_use_renews(bank: Bank, redis: "Redis", tiny_served: ServedModel) -> None:
    version = await publish(bank, tiny_served)
    await bank.soft_prompt(version, tiny_served)
    key = f"frontdesk:blob:{version.digest}"
    assert await redis.ttl(key) > 3000
    await redis.expire(key, 5)
    assert await RedisCache(redis, 3600).get_blob(str(version.digest)) is not None
    assert await redis.ttl(key) > 3000


async def test_soft_prompt_comes_from_redis_when_another_service_put_it_there(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, store: FolderStore, tiny_served: ServedModel
) -> None:
    version = await publish(bank, tiny_served)
    prompt = await bank.soft_prompt(version, tiny_served)
    assert prompt is not None
    (store._folder("banking", 1) / "adapter_model.safetensors").unlink()
    other = await open_bank_at(redis_url).soft_prompt(version, tiny_served)
    assert other is not None
    assert other.digest == prompt.digest


@pytest.mark.parametrize("broken", [b"", b"garbage", make_prompt], ids=["empty", "garbage", "another prompt"])
async def test_broken_blob_in_redis_falls_back_to_the_store(
    bank: Bank, redis: "Redis", tiny_served: ServedModel, broken: bytes | Callable[..., SoftPrompt]
) -> None:
    version = await publish(bank, tiny_served)
    key = f"frontdesk:blob:{version.digest}"
    await redis.set(key, broken if isinstance(broken, bytes) else broken(tiny_served.shape, seed=9).to_bytes())
    prompt = await bank.soft_prompt(version, tiny_served)
    assert prompt is not None
    assert prompt.digest == version.digest
    assert await redis.get(key) == prompt.to_bytes()  # mended


async def test_prompt_of_another_model_is_refused_even_when_it_is_cached(bank: Bank, tiny_served: ServedModel) -> None:
    version = await publish(bank, tiny_served)
    await bank.soft_prompt(version, tiny_served)
    with pytest.raises(BaseModelMismatchError):
        await bank.soft_prompt(version, replace(tiny_served, fingerprint="e" * 64))


async def test_version_of_a_brief_has_no_soft_prompt(bank: Bank, tiny_served: ServedModel) -> None:
    assert await bank.soft_prompt(await publish(bank, tiny_served, seed=None), tiny_served) is None


async def test_unfit_prompt_cannot_be_published(bank: Bank, store: FolderStore, tiny_served: ServedModel) -> None:
    unfit = make_prompt(replace(tiny_served.shape, head_size=3))
    with pytest.raises(SoftPromptError):
        await bank.publish(Draft(make_card(), tiny_served, unfit))
    assert store.domains() == []


async def test_unknown_names_are_refused_with_those_that_exist(bank: Bank, tiny_served: ServedModel) -> None:
    for domain in ("banking", "loans"):
        await publish(bank, tiny_served, seed=None, domain=domain)
        await bank.promote(domain, 1, "ann", "")
    with pytest.raises(UnknownDomainError, match="no domain 'travel' is live; there are: banking, loans"):
        await bank.live("travel", tiny_served)
    with pytest.raises(UnknownVersionError, match="banking has no version 7; it has: 1"):
        await bank.promote("banking", 7, "ann", "")
    with pytest.raises(UnknownVersionError, match="travel has no version 1; it has: none"):
        await bank.promote("travel", 1, "ann", "")


async def test_live_pointers_are_per_base_model(bank: Bank, tiny_served: ServedModel) -> None:
    other = replace(tiny_served, name="other", fingerprint="e" * 64)
    await publish(bank, tiny_served, seed=None)
    await publish(bank, other, seed=None)
    await bank.promote("banking", 1, "ann", "")
    with pytest.raises(UnknownDomainError):
        await bank.live("banking", other)
    await bank.promote("banking", 2, "ann", "")
    assert (await bank.live("banking", tiny_served)).manifest.version == 1
    assert (await bank.live("banking", other)).manifest.version == 2


async def test_promotions_at_once_are_all_recorded(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, store: FolderStore, tiny_served: ServedModel
) -> None:
    banks = [bank, open_bank_at(redis_url), open_bank_at(redis_url)]
    for name in ("a", "b", "c"):
        await publish(bank, tiny_served, seed=None, domain=name)
    async with asyncio.TaskGroup() as tasks:
        for one, name in zip(banks, "abc", strict=True):
            tasks.create_task(one.promote(name, 1, name, ""))
    assert store.pointer_table().epoch == 3
    assert (await bank.claim_table()).live_versions(tiny_served.fingerprint) == {"a": 1, "b": 1, "c": 1}


async def test_promotion_gives_up_when_others_always_come_first(
    store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    class Contended(FolderStore):
        def commit_pointers(self, table: PointerTable) -> None:
            raise PointerConflictError("taken")

    bank = Bank(Contended(store._versions.parent), RedisCache(redis, 60))
    await publish(bank, tiny_served, seed=None)
    with pytest.raises(PointerConflictError, match=r"banking v1 not promoted: 20 other changes came first; try again"):
        await bank.promote("banking", 1, "ann", "")


async def test_bank_of_an_installation_opens_with_its_own_valkey(tiny_served: ServedModel) -> None:
    settings = BankSettings.load()
    async with open_bank(settings) as bank:
        await publish(bank, tiny_served)
        await bank.promote("banking", 1, "ann", "")
    async with open_bank(settings) as bank:
        assert (await bank.live("banking", tiny_served)).manifest.version == 1


@pytest.mark.parametrize("url", ["localhost:6379", "redis://localhost:port", "http://localhost"])
async def test_malformed_redis_url_is_refused_by_the_setting_s_name(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("FRONTDESK_REDIS_URL", url)
    with pytest.raises(ServiceError, match="FRONTDESK_REDIS_URL"):
        async with open_bank(BankSettings.load()):
            pass


@pytest.mark.parametrize(
    ("name", "value"),
    [("FRONTDESK_BLOB_TTL_S", "5"), ("FRONTDESK_DTYPE", "int3"), ("FRONTDESK_WHEN_REDIS_IS_DOWN", "panic")],
)
def test_bad_setting_is_refused_by_name_and_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ServiceError, match=f"setting {name}='{value}': Input should be"):
        BankSettings.load()
