"""A process whose children change a bank and die at every step of it; it checks from the outside what they left.

It is a process of its own because it forks, which wants one thread. What the outside can see of a bank (its files and Redis) is
the same before most steps as one step earlier: a survey finds the others, and the children die there, and at some more. A bank
of this process, a running service's, is open all the while and must find what they left, too. Prints one JSON object: for each
change what was left how often, and what was wrong; and what publishers at one moment were given.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

# Imported before the first fork: the children must not spend their time on it.
import peft  # noqa: F401
from redis import Redis

from prompt_bank.bank import Bank
from prompt_bank.base_model import ModelShape
from prompt_bank.errors import FrontdeskError
from prompt_bank.opening import open_bank
from prompt_bank.pointers import Action, DomainRecord, PointerChange, PointerTable
from prompt_bank.settings import BankSettings
from prompt_bank.store import FolderStore
from prompt_bank.version import Draft, ServedModel
from tests.killing import at_every_step, die_at
from tests.prompt_bank.conftest import make_card, make_prompt

MODEL = ServedModel("tiny", "f" * 64, "c" * 64, ModelShape(num_layers=2, num_kv_heads=2, head_size=16, hidden_size=64))
DOMAIN = "banking"

_OTHERS = 30  # every so many steps one is taken that the survey found nothing new at

Change = Callable[[Bank], Awaitable[object]]


async def _publish(bank: Bank) -> None:
    version = await bank.publish(Draft(make_card(), MODEL, make_prompt(MODEL.shape, seed=9)), "ann", "new")
    await bank.promote(DOMAIN, version.manifest.version, "ann", "new")


# On a bank with v1 to v3, of which v2 is live and v1 was before it; "first" on an empty data folder, store and all.
CHANGES: dict[str, Change] = {
    "first": _publish,
    "publish": _publish,
    "rollback": lambda bank: bank.rollback(DOMAIN, MODEL.fingerprint, "ann", ""),
    "canary": lambda bank: bank.start_canary(DOMAIN, 3, 0.5, "ann", ""),
    "retire": lambda bank: bank.retire(DOMAIN, 2, "ann", ""),
    "delete": lambda bank: bank.delete(DOMAIN, 3, "ann", ""),
}


def make_bank(data_dir: Path, num_changes: int) -> None:
    store = FolderStore(data_dir / "bank")
    for prompt in (make_prompt(MODEL.shape), make_prompt(MODEL.shape, "embeds", 7, seed=1), None):
        store.add_version(Draft(make_card(), MODEL, prompt), "ann", "")
    for epoch in range(1, num_changes + 1):
        store.commit(change("promote", 2 - epoch % 2 if epoch < num_changes else 2), epoch)


def change(action: Action, version: int | None) -> PointerChange:
    return PointerChange(action=action, domain=DOMAIN, fingerprint=MODEL.fingerprint, version=version, actor="ann", reason="")


def half_published(store: FolderStore, domain: str) -> list[str]:
    """What is wrong with the versions that are listed: each must be whole."""
    problems = []
    for number in store.versions(domain):
        try:
            version = store.read_version(domain, number)
            if version.digest is not None:
                store.read_soft_prompt(version, MODEL)  # compares the digest
        except FrontdeskError as error:
            problems.append(f"v{number}: {error}")
    return problems


class _InThisThread(ThreadPoolExecutor):
    """What a loop would have done by threads is done at once: who forks may have none."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:  # type: ignore[override]
        done: Future[Any] = Future()
        try:
            done.set_result(call(*arguments, **named))
        except Exception as error:  # noqa: BLE001  whoever waits for it gets it
            done.set_exception(error)
        return done


class RunningBank:
    """The bank of a service that has been running since before a change."""

    def __init__(self, settings: BankSettings) -> None:
        self._runner = asyncio.Runner()
        self._runner.get_loop().set_default_executor(_InThisThread(1))
        self._opened = AsyncExitStack()
        self._bank = self._runner.run(self._opened.enter_async_context(open_bank(settings)))
        self.claim()

    def claim(self) -> PointerTable:
        return self._runner.run(self._bank.claim_table())

    def close(self) -> None:
        self._runner.run(self._opened.aclose())
        self._runner.close()


class Killer:
    """Forks children that make one change and die at one step."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        self._data_dir = folder / "data"
        self._folder = folder
        self._redis = Redis.from_url(redis_url)
        self._settings = BankSettings(data_dir=self._data_dir, redis_url=redis_url)
        make_bank(self._pristine(""), num_changes=2)
        make_bank(self._pristine("rollback"), num_changes=63)  # after the next change the store writes a whole table

    def _pristine(self, name: str) -> Path:
        """What a change starts from."""
        return self._folder / ("long" if name == "rollback" else "short")

    def kill_everywhere(self, name: str) -> dict[str, object]:
        """Kills at every step before which the files or Redis are not what they were, at some others, and at none."""
        self._reset(name)
        num_steps, changing = self._survey(name)
        seen: Counter[str] = Counter()
        problems: list[str] = []
        steps = sorted({*changing, *range(1, num_steps, _OTHERS), num_steps * 2})
        for step in steps:
            self._reset(name)
            running = None if name == "first" else RunningBank(self._settings)  # which would make the data folder
            is_done = self._in_child(lambda at=step: die_at(at), name) == 0  # type: ignore[misc]
            claimed = running.claim() if running else None  # before another bank is opened, which mends what it finds
            state, wrong = asyncio.run(self._inspect(name, claimed))
            if running:
                running.close()
            seen[state] += 1
            problems += [f"{name}, step {step}, {state}: {problem}" for problem in wrong]
            if is_done != (step > num_steps) and step in changing:
                problems.append(f"{name}, step {step} of {num_steps}: {'not ' * is_done}killed")
        return {"num_steps": num_steps, "num_states": len(changing), "seen": seen, "last": state, "problems": problems}

    def _survey(self, name: str) -> tuple[int, list[int]]:
        """How many steps a change takes, and before which of them the outside is another than a step earlier."""
        changing: list[int] = []
        num_steps = 0
        before = None
        record = self._data_dir.parent / "survey.json"

        def look(step: int) -> None:
            nonlocal before, num_steps
            num_steps = step
            outside = self._outside()
            if outside != before:
                changing.append(step)
                before = outside

        status = self._in_child(lambda: at_every_step(look), name, lambda: record.write_text(json.dumps([num_steps, changing])))
        assert status == 0, f"{name}: the survey failed with wait status {status}"
        num_steps, changing = json.loads(record.read_text())
        return num_steps, changing

    def _outside(self) -> list[object]:
        files = sorted((str(path), path.stat().st_size) for path in self._data_dir.rglob("*"))
        return [files, *((key, self._redis.type(key), self._redis.dump(key)) for key in self._redis.scan_iter())]

    def _reset(self, name: str) -> None:
        shutil.rmtree(self._data_dir, ignore_errors=True)
        if name != "first":
            shutil.copytree(self._pristine(name), self._data_dir)
        self._redis.flushdb()

    def _in_child(self, watch: Callable[[], None], name: str, finish: Callable[[], object] = lambda: None) -> int:
        """Makes the change in a child that `watch` has been called in, and gives its wait status: 0, or killed."""
        child = os.fork()
        if child == 0:
            asyncio.run(self._make(name, watch))
            finish()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"{name}: the child failed with wait status {status}"
        return status

    async def _make(self, name: str, watch: Callable[[], None]) -> None:
        if name == "first":
            watch()
        async with open_bank(self._settings) as bank:
            if name != "first":
                watch()
                asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # whose thread is watched
            await CHANGES[name](bank)
            sys.settrace(None)

    async def _inspect(self, name: str, claimed: PointerTable | None) -> tuple[str, list[str]]:
        """What state the bank is in, and all that is wrong with it; `claimed` is what one that was running found."""
        store = FolderStore(self._data_dir / "bank")
        versions, table = store.versions(DOMAIN), store.pointer_table()
        numbers = set(map(int, os.listdir(self._data_dir / "bank" / "versions" / DOMAIN))) if store.domains() else set()
        problems = half_published(store, DOMAIN)
        if claimed is not None and claimed.domains != table.domains:
            problems.append(f"a running bank claimed {claimed}, the store has {table}")
        before, after = self._expected(name)
        published = {"first": [1], "publish": [1, 2, 3, 4]}.get(name, [1, 2, 3])
        if table.domains == before:
            state = "unchanged"
            allowed = [published, published[:-1]] if name in ("first", "publish") else [published]
        elif table.domains == after:
            state = "changed"
            allowed = [published, [1, 2]] if name == "delete" else [published]
        else:
            state, allowed = "neither", []
            problems.append(f"the table is {table}")
        if versions not in allowed:
            problems.append(f"versions {versions} are listed")
        if state == "unchanged" and name in ("first", "publish"):
            state = "published" if versions == published else "nothing"
        async with open_bank(self._settings) as bank:
            problems += await self._go_on(bank, name, table, numbers)
        return state, problems

    def _expected(self, name: str) -> tuple[dict[str, DomainRecord], dict[str, DomainRecord]]:
        """The table before and after the change, by the rules of the table itself."""
        if name == "first":
            return {}, PointerTable().with_change(change("promote", 1)).domains
        before = FolderStore(self._pristine(name) / "bank").pointer_table()
        made = {
            "publish": change("promote", 4),
            "rollback": change("rollback", None),
            "canary": change("canary", 3).model_copy(update={"share": 0.5}),
            "retire": change("retire", 2),
            "delete": change("delete", 3),
        }[name]
        return before.domains, before.with_change(made).domains

    async def _go_on(self, bank: Bank, name: str, table: PointerTable, numbers: set[int]) -> list[str]:
        """What the next ones find: the live version answers, and a change, a deletion and a publication go well."""
        problems = []
        claimed = await bank.claim_table()
        if claimed.domains != table.domains:
            problems.append(f"claimed {claimed}, the store has {table}")
        live = table.pointers(DOMAIN, MODEL.fingerprint).live
        if live is not None:
            version = await bank.live(DOMAIN, MODEL)
            prompt = await bank.soft_prompt(version, MODEL)
            if version.manifest.version != live or (prompt.digest if prompt else None) != version.digest:
                problems.append(f"v{live} is live, v{version.manifest.version} answered")
        if name == "delete":
            await bank.delete(DOMAIN, 3, "bob", "again")
            left = list((self._data_dir / "bank" / "versions" / DOMAIN / "3").iterdir())
            if left or 3 in FolderStore(self._data_dir / "bank").versions(DOMAIN):
                problems.append(f"after the deletion was repeated there is {left}")
        next_one = await bank.publish(Draft(make_card(), MODEL, make_prompt(MODEL.shape, seed=10)), "bob", "next")
        if next_one.manifest.version in numbers:
            problems.append(f"number {next_one.manifest.version} was given twice")
        await bank.promote(DOMAIN, next_one.manifest.version, "bob", "next")
        if await bank.live(DOMAIN, MODEL) != next_one:
            problems.append("the next publisher's version is not live")
        recorded = [(entry.action, entry.version) for entry in await bank.history(DOMAIN)]
        if recorded[-2:] != [("publish", next_one.manifest.version), ("promote", next_one.manifest.version)]:
            problems.append(f"the history ends with {recorded[-2:]}")
        return problems


def all_at_once(data_dir: Path, redis_url: str, num_publishers: int) -> dict[str, object]:
    """Children that publish at one moment and promote at one moment, and what each was given."""
    settings = BankSettings(data_dir=data_dir, redis_url=redis_url)
    moments = [os.pipe(), os.pipe()]  # closed by the parent when all may go on
    records = [data_dir / f"publisher-{number}.json" for number in range(num_publishers)]

    async def publish_and_promote(seed: int) -> None:
        async with open_bank(settings) as bank:
            os.read(moments[0][0], 1)
            draft = Draft(make_card(), MODEL, make_prompt(MODEL.shape, seed=seed))
            version = await bank.publish(draft, f"publisher {seed}", "")
            os.read(moments[1][0], 1)
            table = await bank.promote(DOMAIN, version.manifest.version, f"publisher {seed}", "")
        given = {"version": version.manifest.version, "digest": version.digest, "epoch": table.epoch}
        records[seed].write_text(json.dumps(given))

    make_bank(data_dir, num_changes=1)
    children = []
    for seed in range(num_publishers):
        child = os.fork()
        if child == 0:
            for _, writing in moments:
                os.close(writing)
            asyncio.run(publish_and_promote(seed))
            os._exit(0)
        children.append(child)
    for _, writing in moments:
        time.sleep(1)  # most are ready by then; who is not, comes later
        os.close(writing)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    store = FolderStore(data_dir / "bank")
    with Redis.from_url(redis_url) as redis:
        published = redis.hget(f"frontdesk:{store.id}:pointers", "epoch")
    return {
        "statuses": statuses,
        "given": [json.loads(record.read_text()) for record in records],
        "half_published": half_published(store, DOMAIN),
        "versions": store.versions(DOMAIN),
        "changes": [(change.action, change.version, change.actor) for change in store.changes()],
        "live": store.pointer_table().pointers(DOMAIN, MODEL.fingerprint).live,
        "redis_epoch": int(published) if isinstance(published, bytes) else None,
    }


def main() -> None:
    warnings.simplefilter("error")
    killer = Killer(Path(sys.argv[1]), sys.argv[2])
    killed = {name: killer.kill_everywhere(name) for name in CHANGES}
    at_once = all_at_once(Path(sys.argv[1]) / "at-once", sys.argv[2], num_publishers=6)
    json.dump({"killed": killed, "at_once": at_once}, sys.stdout)


if __name__ == "__main__":
    main()
