"""The bank over a real store and a real Valkey: never stale, whatever happens to Redis."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from prompt_bank.bank import Bank
from prompt_bank.cache import CLAIM_FIELDS, ReadStats, RedisCache, TableClaim, TableStamp, table_claim
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
from prompt_bank.pointers import DomainPointers, DomainRecord, PointerChange, PointerTable
from prompt_bank.settings import BankSettings
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.store import FolderStore
from prompt_bank.version import Draft, ServedModel
from tests.prompt_bank.conftest import BankOpener, kill_server, make_card, make_prompt, publish, server_pid


def table_key(store: FolderStore) -> str:
    return f"frontdesk:{store.id}:pointers"


def table_of(epoch: int) -> PointerTable:
    return PointerTable(epoch=epoch, domains={"gone": DomainRecord(by_model={"f": DomainPointers(live=epoch)})})


async def stamp_of(cache: RedisCache) -> TableStamp:
    published = await cache.table()
    assert published is not None
    return published[0]


def edit_card(folder: Path, domain: str) -> None:
    (card,) = folder.rglob(f"versions/{domain}/1/card.toml")
    card.write_text(card.read_text(encoding="utf-8") + "# edited", encoding="utf-8")


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
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    version = await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    table, id_ = await bank.claim_table(), await redis.hget(table_key(store), "id")
    await redis.flushall()
    assert await bank.claim_table() == table
    refilled = await redis.hgetall(table_key(store))
    assert refilled[b"id"] != id_
    assert refilled[b"epoch"] == b"1"
    assert await bank.soft_prompt(version, tiny_served) is not None


async def test_redis_set_back_to_an_older_state_is_brought_forward(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    """A server restored from a snapshot has the same table id and an older epoch: the store counts."""
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    await bank.promote("banking", 1, "ann", "")
    older = await redis.hgetall(table_key(store))
    await bank.promote("banking", 2, "ann", "")
    await bank.claim_table()
    await redis.hset(table_key(store), mapping=older)  # type: ignore[arg-type]
    assert (await bank.live("banking", tiny_served)).manifest.version == 2
    assert await redis.hget(table_key(store), "epoch") == b"2"


async def test_older_table_never_overwrites_a_newer_one(redis: "Redis") -> None:
    cache = RedisCache(redis, "store", blob_ttl_s=60)
    newer = table_of(epoch=10)
    first = await cache.publish_table(newer)
    for epoch in (9, 10, 2):
        assert await cache.publish_table(PointerTable(epoch=epoch)) == first
    assert await cache.table() == (first, newer)
    newest = TableStamp(first.id, 11)
    assert await cache.publish_table(PointerTable(epoch=11)) == newest
    assert await cache.claim() == TableClaim(newest)


async def test_start_takes_the_store_s_word_over_a_redis_of_another_past(
    open_bank_at: BankOpener, store: FolderStore, redis: "Redis", redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    await RedisCache(redis, store.id, 60).publish_table(table_of(epoch=50))
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

    await Bank(StoreOfABusyDay(store._versions.parent), RedisCache(redis, store.id, 60)).start()
    published = await RedisCache(redis, store.id, 60).table()
    assert published is not None
    assert published[1] == store.pointer_table()


async def test_redis_down_refuses_and_recovers(
    own_valkey: Callable[[], str], store: FolderStore, open_bank_at: BankOpener, tiny_served: ServedModel
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
    with pytest.raises(RedisUnavailableError, match="redis does not answer"):
        await bank.promote("banking", 1, "ann", "")
    assert store.pointer_table() == table  # refused before anything was changed
    assert own_valkey() == url
    assert await bank.claim_table() == table
    await bank.promote("banking", 1, "ann", "")
    assert (await bank.claim_table()).epoch == 2


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


async def test_start_without_redis_is_refused(open_bank_at: BankOpener, tmp_path: Path) -> None:
    with pytest.raises(RedisUnavailableError, match="start it or set FRONTDESK_REDIS_URL"):
        await open_bank_at(f"unix://{tmp_path}/none.sock").start()


async def test_start_without_redis_takes_the_store_s_table_if_so_configured(
    own_valkey: Callable[[], str], open_bank_at: BankOpener, tiny_served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    url = own_valkey()
    bank = open_bank_at(url)
    await bank.start()
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    await bank.promote("banking", 1, "ann", "")
    await kill_server(url)
    late = open_bank_at(url, "serve_last_known")
    with caplog.at_level(logging.WARNING):
        await late.start()
    assert "starting with the store's pointer table, epoch 1" in caplog.text
    assert (await late.live("banking", tiny_served)).manifest.version == 1
    own_valkey()
    await bank.promote("banking", 2, "ann", "")
    assert (await late.live("banking", tiny_served)).manifest.version == 2


async def left_after_commit(bank: Bank, store: FolderStore, redis: "Redis", version: int) -> None:
    """A promotion that is in the store, and of which Redis knows no more than that one was begun."""
    token = await RedisCache(redis, store.id, 60).begin_change()
    assert token
    change = PointerChange(
        action="promote",
        domain="banking",
        fingerprint=(await asyncio.to_thread(store.read_version, "banking", version)).manifest.base_model.fingerprint,
        version=version,
        actor="ann",
        reason="left",
    )
    store.commit(change, store.pointer_table().epoch + 1)


async def test_a_change_whose_author_died_before_redis_knew_is_seen_at_once(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    """The claims that follow find the version in the store, on the connections they always had."""
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    await bank.promote("banking", 1, "ann", "")
    assert (await bank.live("banking", tiny_served)).manifest.version == 1
    await left_after_commit(bank, store, redis, version=2)
    assert (await bank.live("banking", tiny_served)).manifest.version == 2
    assert await redis.hget(table_key(store), "epoch") == b"2"


async def test_a_dead_author_s_change_is_pending_no_longer_than_a_minute(
    bank: Bank,
    store: FolderStore,
    redis: "Redis",
    tiny_served: ServedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await publish(bank, tiny_served)
    cache = RedisCache(redis, store.id, 60)
    dead = await cache.begin_change()
    await bank.claim_table()
    assert await cache.claim() == TableClaim(await stamp_of(cache), (dead,))
    monkeypatch.setattr("prompt_bank.pending._PENDING_S", 0.0)
    await bank.claim_table()
    assert await cache.claim() == TableClaim(await stamp_of(cache))
    assert "1 changes of the pointer table were never finished by their authors" in caplog.text


async def test_a_dead_author_s_change_is_forgotten_however_many_others_come_and_go(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    await publish(bank, tiny_served)
    cache = RedisCache(redis, store.id, 60)
    dead = await cache.begin_change()
    now = time.monotonic()
    for passed_s in (0, 30, 59):
        monkeypatch.setattr("prompt_bank.pending.time.monotonic", lambda passed_s=passed_s: now + passed_s)
        await cache.begin_change()
        await bank.claim_table()
        await bank.promote("banking", 1, "ann", "")
    monkeypatch.setattr("prompt_bank.pending.time.monotonic", lambda: now + 61)
    alive = await cache.begin_change()
    await bank.claim_table()
    pending = (await cache.claim()).pending
    assert dead not in pending
    assert len(pending) == 3  # of 30 and 59 seconds, and the new one
    assert alive in pending


async def test_claims_while_a_dead_author_s_change_is_pending_publish_nothing(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    """What each would publish is the whole table: 5 ms of the event loop with a thousand domains."""
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    await bank.promote("banking", 1, "ann", "")
    await left_after_commit(bank, store, redis, version=2)
    tables = [await bank.claim_table()]  # this one brings Redis to the store's
    before = (await redis.info("stats"))["total_commands_processed"]
    tables += [await bank.claim_table() for _ in range(5)]
    assert (await redis.info("stats"))["total_commands_processed"] - before == 6  # the claims, and INFO itself
    assert tables == [store.pointer_table()] * 6
    await left_after_commit(bank, store, redis, version=1)
    assert (await bank.live("banking", tiny_served)).manifest.version == 1


class CountingStore(FolderStore):
    """Counts reads of its table, which take a while; `meanwhile` happens once, after one has read and before it returns."""

    num_reads = 0
    meanwhile: Callable[[], object] | None = None

    def pointer_table(self) -> PointerTable:
        self.num_reads += 1
        table = super().pointer_table()
        if self.meanwhile is not None:
            call, self.meanwhile = self.meanwhile, None
            call()
        time.sleep(0.01)
        return table


@pytest.fixture
async def counting(store: FolderStore, redis_url: str) -> AsyncIterator[tuple[CountingStore, Bank]]:
    counting = CountingStore(store._versions.parent)
    cache = RedisCache.connect(redis_url, store.id, blob_ttl_s=60, timeout_s=5)
    bank = Bank(counting, cache)
    await bank.start()
    yield counting, bank
    await cache.aclose()


async def test_claims_at_once_share_a_look_into_the_store(
    bank: Bank, redis: "Redis", counting: tuple[CountingStore, Bank], tiny_served: ServedModel
) -> None:
    store, late = counting
    await publish(bank, tiny_served)
    await RedisCache(redis, store.id, 60).begin_change()
    await asyncio.gather(*(late.claim_table() for _ in range(32)))  # makes the connections
    store.num_reads = 0
    tables = await asyncio.gather(*(late.claim_table() for _ in range(32)))
    assert tables == [store.pointer_table()] * 32
    assert store.num_reads <= 5  # one for those who asked before another's had begun, and so on


async def test_a_look_that_began_before_a_claim_does_not_count_for_it(
    bank: Bank, redis: "Redis", counting: tuple[CountingStore, Bank], tiny_served: ServedModel
) -> None:
    """The first claim's look reads the store; then a promotion is committed, and then the second claim is made."""
    store, late = counting
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    await bank.promote("banking", 1, "ann", "")
    await RedisCache(redis, store.id, 60).begin_change()
    for _ in range(2):
        await late.claim_table()
    second: list[asyncio.Task[PointerTable]] = []
    loop = asyncio.get_running_loop()

    async def promote_and_claim() -> None:
        await left_after_commit(bank, FolderStore(store._versions.parent), redis, version=2)
        second.append(asyncio.create_task(late.claim_table()))
        await asyncio.sleep(0.05)

    store.meanwhile = lambda: asyncio.run_coroutine_threadsafe(promote_and_claim(), loop).result(10)
    assert (await late.claim_table()).epoch == 1  # was begun before the promotion: either table is right
    assert store.meanwhile is None
    assert (await second[0]).epoch == 2


async def test_another_reader_of_redis_gets_the_table_of_what_it_read(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel
) -> None:
    """As the inbox does, which reads the table's fields in a script of its own."""
    late = open_bank_at(redis_url)
    await late.start()
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    script = late.cache.redis.register_script("return redis.call('HMGET', KEYS[1], unpack(ARGV))")
    for number in (1, 2):
        await bank.promote("banking", number, "ann", "")
        claim = table_claim(*await script(keys=[late.cache.table_key], args=list(CLAIM_FIELDS)))
        assert claim == await late.cache.claim()
        table = await late.table_of(claim)
        assert table.live_versions(tiny_served.fingerprint) == {"banking": number}


async def test_a_change_takes_its_own_token_back_and_no_other(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    await publish(bank, tiny_served)
    cache = RedisCache(redis, store.id, 60)
    other = await cache.begin_change()
    await bank.promote("banking", 1, "ann", "")
    with pytest.raises(UnknownVersionError):
        await bank.rollback("banking", tiny_served.fingerprint, "ann", "")
    assert await cache.claim() == TableClaim(await stamp_of(cache), (other,))


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


async def test_full_memory_evicts_blobs_and_keeps_the_pointers(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    published = await redis.hgetall(table_key(store))
    cache = RedisCache(redis, store.id, blob_ttl_s=3600)
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
    assert await redis.hgetall(table_key(store)) == published
    assert await redis.ttl(table_key(store)) == -1


async def test_blobs_have_a_ttl_that_use_renews(bank: Bank, redis: "Redis", tiny_served: ServedModel) -> None:
    version = await publish(bank, tiny_served)
    await bank.soft_prompt(version, tiny_served)
    key = f"frontdesk:blob:{version.digest}"
    assert await redis.ttl(key) > 3000
    await redis.expire(key, 5)
    assert await RedisCache(redis, "another store", 3600).get_blob(str(version.digest)) is not None
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


async def test_version_of_a_brief_has_no_soft_prompt_to_ask_for(bank: Bank, tiny_served: ServedModel) -> None:
    version = await publish(bank, tiny_served, seed=None)
    with pytest.raises(AssertionError, match="banking v1 is served by its brief"):
        await bank.soft_prompt(version, tiny_served)


async def test_unfit_prompt_cannot_be_published(bank: Bank, store: FolderStore, tiny_served: ServedModel) -> None:
    unfit = make_prompt(replace(tiny_served.shape, head_size=3))
    with pytest.raises(SoftPromptError):
        await bank.publish(Draft(make_card(), tiny_served, unfit), "ann", "test")
    assert store.domains() == []


async def test_unknown_names_are_refused_with_those_that_exist(bank: Bank, tiny_served: ServedModel) -> None:
    for domain in ("banking", "loans"):
        await publish(bank, tiny_served, seed=None, domain=domain)
        await bank.promote(domain, 1, "ann", "")
    with pytest.raises(UnknownDomainError, match="no domain 'travel' is live; there are: banking, loans"):
        await bank.live("travel", tiny_served)
    with pytest.raises(UnknownVersionError, match="banking has no version 7; it has: 1"):
        await bank.promote("banking", 7, "ann", "")
    with pytest.raises(
        UnknownVersionError, match="travel has no version 1, nor any other; the bank has the domains: banking, loans"
    ):
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
        def commit(self, change: PointerChange, epoch: int) -> PointerTable:
            raise PointerConflictError("taken")

    bank = Bank(Contended(store._versions.parent), RedisCache(redis, store.id, 60))
    await publish(bank, tiny_served, seed=None)
    with pytest.raises(PointerConflictError, match=r"promote of banking not made: 20 other changes came first; try again"):
        await bank.promote("banking", 1, "ann", "")


async def test_two_stores_on_one_redis_do_not_disturb_each_other(
    bank: Bank, redis: "Redis", redis_url: str, tiny_served: ServedModel, tmp_path: Path
) -> None:
    other_store = FolderStore(tmp_path / "other")
    cache = RedisCache.connect(redis_url, other_store.id, blob_ttl_s=3600, timeout_s=2)
    other = Bank(other_store, cache)
    try:
        await other.start()
        for one, brief in ((bank, "Ours."), (other, "Theirs.")):
            await one.publish(Draft(make_card(brief=brief), tiny_served), "ann", "test")
        await bank.promote("banking", 1, "ann", "")
        with pytest.raises(UnknownDomainError):
            await other.live("banking", tiny_served)
        await other.promote("banking", 1, "bob", "")
        await other.promote("banking", 1, "bob", "")
        assert (await bank.claim_table()).epoch == 1
        assert (await other.claim_table()).epoch == 2
        assert (await bank.live("banking", tiny_served)).card.brief == "Ours."
        assert (await other.live("banking", tiny_served)).card.brief == "Theirs."
        assert len(await redis.keys("frontdesk:*:pointers")) == 2
    finally:
        await cache.aclose()


async def drop_connections(redis: "Redis") -> None:
    """As a restart of the server does."""
    await redis.client_kill_filter(_type="normal", skipme=True)


async def test_bank_is_not_stale_after_redis_lost_the_write_it_had_not_seen(
    bank: Bank, open_bank_at: BankOpener, store: FolderStore, redis: "Redis", redis_url: str, tiny_served: ServedModel
) -> None:
    """The stamp that came back is the very one this bank knows: only that its connection is new tells."""
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    await bank.promote("banking", 1, "ann", "")
    late = open_bank_at(redis_url)
    await late.start()
    await late.claim_table()
    older = await redis.hgetall(table_key(store))
    await bank.promote("banking", 2, "ann", "")
    await redis.hset(table_key(store), mapping=older)  # type: ignore[arg-type]
    await drop_connections(redis)
    for one in (late, bank):
        with suppress(RedisUnavailableError):  # what is sent on a dropped connection is refused, as with a Redis that is away
            await one.claim_table()
        assert (await one.live("banking", tiny_served)).manifest.version == 2
    assert await redis.hget(table_key(store), "epoch") == b"2"


async def test_bank_is_not_stale_when_a_soft_prompt_made_the_new_connection(
    bank: Bank, open_bank_at: BankOpener, store: FolderStore, redis: "Redis", redis_url: str, tiny_served: ServedModel
) -> None:
    for seed in (1, 2):
        await publish(bank, tiny_served, seed)
    await bank.promote("banking", 1, "ann", "")
    late = open_bank_at(redis_url)
    await late.start()
    version = await late.live("banking", tiny_served)
    older = await redis.hgetall(table_key(store))
    await bank.promote("banking", 2, "ann", "")
    await redis.hset(table_key(store), mapping=older)  # type: ignore[arg-type]
    await drop_connections(redis)
    for _ in range(2):
        assert await late.soft_prompt(version, tiny_served) is not None
    assert (await late.live("banking", tiny_served)).manifest.version == 2


async def test_broken_table_in_redis_is_replaced_by_the_store_s(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    await redis.hset(table_key(store), mapping={"epoch": 7, "table": "{"})
    assert await bank.claim_table() == store.pointer_table()
    assert await redis.hget(table_key(store), "epoch") == b"1"
    assert "the pointer table in redis is broken, the store's is taken instead" in caplog.text


@pytest.fixture
async def stopped_redis(own_valkey: Callable[[], str]) -> AsyncIterator[tuple[str, Callable[[], Awaitable[None]]]]:
    """A Valkey's URL, and a function after which it takes connections but answers nothing."""
    url = own_valkey()
    pid = await server_pid(url)

    async def stop() -> None:
        os.kill(pid, signal.SIGSTOP)

    yield url, stop
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("mode", ["refuse", "serve_last_known"])
async def test_slow_redis_holds_a_claim_no_longer_than_its_timeout(
    stopped_redis: tuple[str, Callable[[], Awaitable[None]]],
    open_bank_at: BankOpener,
    tiny_served: ServedModel,
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    url, stop = stopped_redis
    bank = open_bank_at(url, mode, timeout_s=0.3)
    await bank.start()
    version = await publish(bank, tiny_served)
    await bank.promote("banking", 1, "ann", "")
    table = await bank.claim_table()
    await stop()
    started = time.monotonic()
    if mode == "refuse":
        with pytest.raises(RedisUnavailableError, match="redis does not answer"):
            await bank.claim_table()
    else:
        assert await bank.claim_table() == table
        assert "serving the last known pointer table, epoch 1" in caplog.text
    assert 0.2 < time.monotonic() - started < 1.5
    started = time.monotonic()
    prompt = await bank.soft_prompt(version, tiny_served)
    assert prompt is not None
    assert prompt.digest == version.digest
    assert time.monotonic() - started < 1.5
    assert "banking v1 is read from the store" in caplog.text
    assert bank.read_stats()["redis"] == ReadStats(num_errors=1)


async def test_reads_of_soft_prompts_are_counted_by_tier_and_how_they_ended(
    bank: Bank, store: FolderStore, redis: "Redis", tiny_served: ServedModel
) -> None:
    version = await publish(bank, tiny_served)
    counted = [bank.read_stats()["redis"]]
    key = f"frontdesk:blob:{version.digest}"
    for is_broken in (False, False, True, False, False):
        if is_broken:
            await redis.set(key, b"garbage")
        await bank.soft_prompt(version, tiny_served)
        counted.append(bank.read_stats()["redis"])
    assert counted == [
        ReadStats(),
        ReadStats(num_misses=1),
        ReadStats(num_misses=1, num_hits=1),
        ReadStats(num_misses=1, num_hits=1, num_errors=1),
        ReadStats(num_misses=1, num_hits=2, num_errors=1),
        ReadStats(num_misses=1, num_hits=3, num_errors=1),
    ]
    assert bank.read_stats()["store"] == ReadStats(num_hits=2)  # the miss, and instead of the broken blob
    (store._folder("banking", 1) / "adapter_model.safetensors").write_bytes(b"broken")
    await redis.delete(key)
    with pytest.raises(SoftPromptError):
        await bank.soft_prompt(version, tiny_served)
    assert bank.read_stats()["store"] == ReadStats(num_hits=2, num_errors=1)


@pytest.mark.parametrize("count", [100, 300])
async def test_many_claims_at_once_on_fresh_connections(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel, count: int
) -> None:
    await publish(bank, tiny_served, seed=None)
    await bank.promote("banking", 1, "ann", "")
    fresh = open_bank_at(redis_url)
    await fresh.start()
    async with asyncio.TaskGroup() as tasks:
        claims = [tasks.create_task(fresh.claim_table()) for _ in range(count)]
    assert {claim.result().epoch for claim in claims} == {1}
    await bank.promote("banking", 1, "ann", "again")
    async with asyncio.TaskGroup() as tasks:
        claims = [tasks.create_task(fresh.claim_table()) for _ in range(count)]
    assert {claim.result().epoch for claim in claims} == {2}


async def test_table_of_many_changes_is_found_by_a_bank_that_starts(
    bank: Bank, open_bank_at: BankOpener, store: FolderStore, redis: "Redis", redis_url: str, tiny_served: ServedModel
) -> None:
    for _ in range(2):
        await publish(bank, tiny_served, seed=None)
    for n in range(70):
        await bank.promote("banking", n % 2 + 1, "ann", f"change {n + 1}")
    assert [path.name for path in store._tables.iterdir()] == ["000000000064.json"]
    await redis.flushall()
    reopened = FolderStore(store._versions.parent)
    cache = RedisCache.connect(redis_url, reopened.id, blob_ttl_s=3600, timeout_s=2)
    try:
        started = Bank(reopened, cache)
        await started.start()
        assert await started.claim_table() == await bank.claim_table() == store.pointer_table()
        assert (await started.claim_table()).epoch == 70
    finally:
        await cache.aclose()


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
