"""Never stale: while operating-system processes publish and promote, every answer of every service is checked.

Redis is flushed, killed, and set back to an older state meanwhile; one publisher's every change dies at some step.
"""

import asyncio
import shutil
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from redis import Redis

from prompt_bank.bank import Bank
from prompt_bank.base_model import BaseModel
from prompt_bank.cache import RedisCache
from prompt_bank.errors import RedisUnavailableError
from prompt_bank.pointers import PointerChange, PointerTable
from prompt_bank.store import FolderStore
from prompt_bank.version import Draft, ServedModel, Version
from tests.bot.conftest import tiny_model_dir
from tests.never_stale.checker import Change, Truth, Turn, check, least_epoch
from tests.never_stale.publisher import DOMAIN
from tests.never_stale.town import Heard, Town, running_town
from tests.prompt_bank.conftest import make_card

__all__ = ["tiny_model_dir"]  # a fixture of the services' tests

SECONDS = 12.0  # a busy machine answers few turns a second


@pytest.fixture(scope="module")
def town(
    tiny_model_dir: Path,
    models_dir: Path,
    tiny_served: ServedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Town]:
    with running_town(tmp_path_factory.mktemp("town"), tiny_model_dir, models_dir, tiny_served) as running:
        yield running


async def check_all(town: Town, heard: Heard, base: BaseModel, model: ServedModel) -> None:
    """Every turn; that there was something to find; and that the same checks find what is altered."""
    changes, truths = town.changes(model.fingerprint), await town.truths(heard, base, model)
    assert check(heard.turns, changes, truths) == []
    since_ns = min(turn.sent_ns for turn in heard.turns)
    assert len(heard.turns) >= 30
    assert len([each for each in changes if (each.returned_ns or 0) > since_ns]) >= 20
    assert len({turn.version for turn in heard.turns}) >= 10
    kinds = {version.manifest.soft_prompt and version.manifest.soft_prompt.kind for version in _answering(town, heard)}
    assert kinds == {None, "embeds", "prefix_kv"}
    assert len([versions for versions in _by_conversation(heard).values() if len(set(versions)) > 1]) >= 5
    firsts = {turn.version: turn.text for turn in heard.turns if len(heard.messages[turn.id]) == 1}
    assert len(set(firsts.values())) == len(firsts)  # so a text tells its version
    assert all(heard.is_in_outage(*span) for span in heard.refused)
    _check_the_check(heard.turns, changes, truths)


def _answering(town: Town, heard: Heard) -> list[Version]:
    return [town.store.read_version(DOMAIN, number) for number in {turn.version for turn in heard.turns}]


def _by_conversation(heard: Heard) -> dict[str, list[int]]:
    versions = defaultdict(list)
    for turn in sorted(heard.turns, key=lambda turn: turn.sent_ns):
        versions[turn.conversation].append(turn.version)
    return versions


def _check_the_check(turns: list[Turn], changes: list[Change], truths: dict[str, Truth]) -> None:
    """Negative controls: one turn is given the version that was live one change earlier, another one's text, another log."""
    by_epoch = {each.epoch: each.live for each in changes}
    turn, old = next(
        (turn, old)
        for turn in turns
        if not turn.is_excused
        and (old := by_epoch[(least := least_epoch(turn, changes)) - 1])
        not in {each.live for each in changes if each.epoch >= least and each.began_ns <= turn.started_ns}
    )
    truth = truths[turn.id]
    stale = replace(turn, version=old, last_version=old)
    logged = {**truths, turn.id: replace(truth, logged=(old, turn.digest, turn.text))}
    (problem,) = check([stale if each is turn else each for each in turns], changes, logged)
    assert problem.startswith(f"turn {turn.id}, v{old}: stale: sent when epoch")
    mixed = replace(turn, text=next(each.text for each in turns if each.text not in truth.texts))
    problems = check([mixed if each is turn else each for each in turns], changes, truths)
    assert len(problems) == 2  # against the version's answer, and against the log
    moved = replace(turn, last_version=old)
    (problem,) = check([moved if each is turn else each for each in turns], changes, truths)
    assert problem.endswith(f"it ended as v{old}")


async def test_a_promote_is_never_followed_by_an_older_version(town: Town, tiny: BaseModel, tiny_served: ServedModel) -> None:
    heard = await town.run(SECONDS, is_doomed=False)
    assert heard.refused == []
    await check_all(town, heard, tiny, tiny_served)


async def test_publishers_killed_meanwhile(town: Town, tiny: BaseModel, tiny_served: ServedModel) -> None:
    heard = await town.run(SECONDS)
    assert heard.refused == []
    await check_all(town, heard, tiny, tiny_served)
    assert set(town.statuses()) <= {0, 9}  # done, or killed; never failed
    committed = town.committed_by_killed()
    assert len(committed) >= 3  # whatever Redis knew of them


async def test_redis_flushed_meanwhile(town: Town, tiny: BaseModel, tiny_served: ServedModel) -> None:
    ids = set()

    async def flush(town: Town, heard: Heard) -> None:
        for _ in range(8):
            await asyncio.sleep(SECONDS / 10)
            ids.add(town.redis.client.hget(town.table_key, "id"))
            town.redis.client.flushall()

    heard = await town.run(SECONDS, flush)
    assert heard.refused == []
    assert len(ids) >= 6
    await check_all(town, heard, tiny, tiny_served)


async def test_redis_killed_and_started_again_meanwhile(town: Town, tiny: BaseModel, tiny_served: ServedModel) -> None:
    async def kill(town: Town, heard: Heard) -> None:
        for _ in range(2):
            await asyncio.sleep(SECONDS / 5)
            gone_ns = time.monotonic_ns()
            heard.outages.append((gone_ns, 2**63))
            town.redis.kill()
            await asyncio.sleep(SECONDS / 10)
            await asyncio.to_thread(town.redis.start)
            heard.outages[-1] = (gone_ns, time.monotonic_ns())

    heard = await town.run(SECONDS, kill)
    assert len(heard.refused) >= 1
    assert len([turn for turn in heard.turns if turn.is_excused]) >= 1  # by the service that goes on with what it knows
    await check_all(town, heard, tiny, tiny_served)


async def test_redis_set_back_to_an_older_state_meanwhile(
    town: Town, tiny: BaseModel, tiny_served: ServedModel, tmp_path: Path
) -> None:
    async def set_back(town: Town, heard: Heard) -> None:
        await put_back(town, heard, SECONDS / 10)
        await start_older(town, heard, tmp_path / "older")

    heard = await town.run(SECONDS, set_back)
    await check_all(town, heard, tiny, tiny_served)


def put_table_back(client: Redis, key: str, older: bytes) -> None:
    """In one moment with the end of all connections: nobody reads what was right until then over one that he had."""
    with client.pipeline(transaction=True) as together:
        together.restore(key, 0, older, replace=True)
        together.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        together.execute()


async def put_back(town: Town, heard: Heard, pause_s: float) -> None:
    """Redis has the table of some changes ago again."""
    for _ in range(2):
        older, epoch = town.redis.client.dump(town.table_key), town.store.pointer_table().epoch
        await asyncio.sleep(pause_s)
        assert town.store.pointer_table().epoch > epoch
        gone_ns = time.monotonic_ns()
        heard.outages.append((gone_ns, 2**63))
        put_table_back(town.redis.client, town.table_key, older)
        heard.outages[-1] = (gone_ns, time.monotonic_ns())


async def start_older(town: Town, heard: Heard, copy: Path) -> None:
    """Killed, and started on a copy of its files made some changes ago; then once more on none at all."""
    shutil.copytree(town.redis.data, copy)
    for older in (copy, None):
        await asyncio.sleep(SECONDS / 8)
        gone_ns = time.monotonic_ns()
        heard.outages.append((gone_ns, 2**63))
        town.redis.kill()
        shutil.rmtree(town.redis.data)
        if older is not None:
            shutil.copytree(older, town.redis.data)
        await asyncio.to_thread(town.redis.start)
        heard.outages[-1] = (gone_ns, time.monotonic_ns())


def test_publishers_were_killed_all_the_while(town: Town) -> None:
    statuses = town.statuses()
    assert set(statuses) <= {0, 9}
    assert statuses.count(9) >= 20
    assert len(town.committed_by_killed()) >= 10


# The moments the town hardly ever meets: Redis loses a promotion that somebody has not seen, who takes it to be unchanged.


class SlowStore(FolderStore):
    """Has something happen between the reading of its table and the use of what was read."""

    meanwhile: Callable[[], object] | None = None

    def pointer_table(self) -> PointerTable:
        table = super().pointer_table()
        if self.meanwhile is not None:
            call, self.meanwhile = self.meanwhile, None
            call()
        return table


@dataclass
class TwoBanks:
    """`reader` and `promoter` know v1 as live; their store holds v1 to v3."""

    store: FolderStore
    slow_store: SlowStore  # the reader's
    reader: Bank
    promoter: Bank
    cache: RedisCache


async def live(bank: Bank, model: ServedModel) -> int:
    return (await bank.live(DOMAIN, model)).manifest.version


@pytest.fixture
async def two_banks(redis_url: str, tmp_path: Path, tiny_served: ServedModel) -> AsyncIterator[TwoBanks]:
    store, slow_store = FolderStore(tmp_path / "bank"), SlowStore(tmp_path / "bank")
    for brief in ("one", "two", "three"):
        store.add_version(Draft(make_card(DOMAIN, brief), tiny_served), "ann", "")
    caches = [RedisCache.connect(redis_url, store.id, blob_ttl_s=60, timeout_s=5) for _ in range(3)]
    reader, promoter = Bank(slow_store, caches[0]), Bank(store, caches[1])
    await promoter.start()
    await promoter.promote(DOMAIN, 1, "ann", "")
    for bank in (reader, promoter):
        await bank.start()
        await bank.claim_table()
    yield TwoBanks(store, slow_store, reader, promoter, caches[2])
    for cache in caches:
        await cache.aclose()


def promotion(version: int, model: ServedModel) -> PointerChange:
    return PointerChange(
        action="promote", domain=DOMAIN, fingerprint=model.fingerprint, version=version, actor="bob", reason="slowly"
    )


async def test_a_slow_publisher_s_table_in_an_emptied_redis_is_not_taken(
    two_banks: TwoBanks, redis_url: str, tiny_served: ServedModel
) -> None:
    slow_table = two_banks.store.commit(promotion(2, tiny_served), 2)  # and is not published yet
    await two_banks.promoter.promote(DOMAIN, 3, "ann", "")
    with Redis.from_url(redis_url) as client:
        client.flushall()
    await two_banks.cache.publish_table(slow_table)  # now it is
    assert await live(two_banks.reader, tiny_served) == 3
    assert await live(two_banks.promoter, tiny_served) == 3


async def test_a_slow_refill_of_an_emptied_redis_is_not_taken_for_the_newest(
    two_banks: TwoBanks, redis_url: str, tiny_served: ServedModel
) -> None:
    def promote_and_lose_it() -> None:
        two_banks.store.commit(promotion(2, tiny_served), 2)  # published too, to the Redis that is then emptied again
        with Redis.from_url(redis_url) as client:
            client.flushall()

    with Redis.from_url(redis_url) as client:
        client.flushall()
    two_banks.slow_store.meanwhile = promote_and_lose_it
    await two_banks.reader.claim_table()  # was begun before the promotion: either table is right
    assert two_banks.slow_store.meanwhile is None
    assert await live(two_banks.reader, tiny_served) == 2
    assert await live(two_banks.promoter, tiny_served) == 2


async def test_a_redis_set_back_to_what_an_idle_bank_knows_is_not_believed(
    two_banks: TwoBanks, redis_url: str, tiny_served: ServedModel
) -> None:
    key = f"frontdesk:{two_banks.store.id}:pointers"
    with Redis.from_url(redis_url) as client:
        older = client.dump(key)
        await two_banks.promoter.promote(DOMAIN, 2, "ann", "")
        put_table_back(client, key, older)
        assert client.hget(key, "epoch") == b"1"
    with suppress(RedisUnavailableError):  # who meets the end of his connection is refused
        await two_banks.reader.claim_table()
    assert await live(two_banks.reader, tiny_served) == 2
