"""A process that publishes versions and moves pointers in a loop, and records when.

`publisher.py NAME DATA_DIR REDIS_URL RECORDS MODEL [doomed]`: prints `ready`; for each line read, a time of CLOCK_MONOTONIC in
nanoseconds, goes on until then and prints `done`. RECORDS gets two JSON lines a change, which it names by its reason: `began`,
and unless it was killed `ended`. A doomed one has every change made by a child that kills itself at some step, of three in one
anywhere, in one from the change's beginning on, and in one after its commit.
"""

import asyncio
import json
import os
import random
import sys
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import peft  # noqa: F401  imported before the first change, which must not wait for it

from prompt_bank.bank import Bank
from prompt_bank.base_model import ModelShape
from prompt_bank.cache import RedisCache
from prompt_bank.errors import RedisUnavailableError
from prompt_bank.opening import open_bank
from prompt_bank.settings import BankSettings
from prompt_bank.version import Draft, ServedModel
from tests.killing import die_at
from tests.prompt_bank.conftest import make_card, make_prompt

DOMAIN = "banking"
_PAUSE_S = 0.03  # leaves the services some of the processors
_NUM_STEPS = 700  # of opening a bank, publishing and promoting
_NUM_STEPS_OF_CHANGE = 120  # of these, from the moment on at which Redis is told that a change begins
_NUM_STEPS_SINCE_COMMIT = 16  # of these, from the moment on at which Redis is to be told of what is in the store


def draft(name: str, number: int, model: ServedModel) -> Draft:
    """Another version for each name and number: of both kinds, of many lengths, and of a brief alone."""
    generator = random.Random(f"{name} {number}")
    if number % 5 == 4:
        return Draft(make_card(DOMAIN, f"You are {name}, clerk {generator.random()}."), model)
    kind = "embeds" if number % 2 else "prefix_kv"
    prompt = make_prompt(model.shape, kind, generator.randint(1, 24), seed=generator.getrandbits(32))  # type: ignore[arg-type]
    return Draft(make_card(DOMAIN), model, prompt)


class Publisher:
    def __init__(self, name: str, settings: BankSettings, records: Path, model: ServedModel) -> None:
        self._name = name
        self._settings = settings
        self._records = records
        self._model = model
        self._number = count(1)
        self._mine: list[int] = []

    def _record(self, event: str, reason: str, **more: Any) -> None:
        with self._records.open("a") as file:  # in one write: other processes append too
            file.write(json.dumps({"event": event, "reason": reason, "at_ns": time.monotonic_ns(), **more}) + "\n")

    async def run(self) -> None:
        async with open_bank(self._settings) as bank:
            print("ready", flush=True)
            while line := await asyncio.to_thread(sys.stdin.readline):
                while time.monotonic_ns() < int(line):
                    await self._change(bank, next(self._number))
                    await asyncio.sleep(_PAUSE_S)
                print("done", flush=True)

    async def _change(self, bank: Bank, number: int) -> None:
        reason = f"{self._name} {number}"
        draft_ = draft(self._name, number, self._model)
        is_new = number % 4 in (1, 2) or not self._mine
        if is_new:
            self._mine.append((await bank.publish(draft_, self._name, reason)).manifest.version)
        self._record("began", reason)
        try:
            if number % 4 == 3:
                table = await bank.rollback(DOMAIN, self._model.fingerprint, self._name, reason)
            else:
                version = self._mine[-1] if is_new else random.choice(self._mine)
                table = await bank.promote(DOMAIN, version, self._name, reason)
        except RedisUnavailableError:
            return  # committed, but others need not know yet
        self._record("ended", reason, epoch=table.epoch)

    def run_doomed(self) -> None:
        print("ready", flush=True)
        while line := sys.stdin.readline():
            while time.monotonic_ns() < int(line):
                self._run_child(next(self._number))
                time.sleep(_PAUSE_S)
            print("done", flush=True)

    def _run_child(self, number: int) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio.run(self._die_changing(number))
                status = 0
            except RedisUnavailableError:
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        self._record("child", f"{self._name} {number}", status=status)

    async def _die_changing(self, number: int) -> None:
        reason = f"{self._name} {number}"
        draw = random.Random(reason)
        if number % 3 == 0:
            die_at(draw.randint(1, _NUM_STEPS))
        elif number % 3 == 1:
            die_at(draw.randint(1, _NUM_STEPS_OF_CHANGE), since=RedisCache.begin_change)
        async with open_bank(self._settings) as bank:
            if number % 3 == 2:  # only now: opening a bank tells Redis, too
                die_at(draw.randint(1, _NUM_STEPS_SINCE_COMMIT), since=RedisCache.publish_table)
            version = await bank.publish(draft(self._name, number, self._model), self._name, reason)
            self._record("began", reason)
            table = await bank.promote(DOMAIN, version.manifest.version, self._name, reason)
            self._record("ended", reason, epoch=table.epoch)


def model_argument(model: ServedModel) -> str:
    return json.dumps(asdict(model))


def main() -> None:
    name, data_dir, redis_url, records, model = sys.argv[1:6]
    values = json.loads(model)
    served = ServedModel(**{**values, "shape": ModelShape(**values["shape"])})
    settings = BankSettings(data_dir=Path(data_dir), redis_url=redis_url, redis_timeout_s=10)
    publisher = Publisher(name, settings, Path(records), served)
    if sys.argv[6:] == ["doomed"]:
        publisher.run_doomed()
    else:
        asyncio.run(publisher.run())


if __name__ == "__main__":
    main()
