"""Measures the prompt bank: bytes, promotes, claims, cold loads and memory, with 1, 100 and 1,000 domains; publish to served.

    python -m tests.benchmarks.bench_bank [--quick]

Soft prompts are random numbers in the shape of the default model; only "publish to served" runs the model itself. The bank's
Redis is its embedded Valkey on a Unix socket (one row says TCP), its store a folder in the temp folder. Times depend on the
machine and on what else it does: compare figures of one run.
"""

import argparse
import asyncio
import gc
import resource
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier

import httpx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bot.channels.http.server import serving
from bot.engine.prefix import PrefixStore
from bot.engine.request import PromptRef
from bot.routing.encoder import Encoder
from bot.routing.live import LiveRouter
from bot.settings import Settings
from prompt_bank.bank import Bank
from prompt_bank.base_model import ModelShape, pick_device, pick_dtype
from prompt_bank.cache import RedisCache
from prompt_bank.card import Card
from prompt_bank.opening import load_model, open_bank
from prompt_bank.settings import BankSettings
from prompt_bank.soft_prompt import KINDS, Kind, SoftPrompt, expected_shape
from prompt_bank.store import FolderStore
from prompt_bank.version import Draft, ServedModel

SMOLLM2_SHAPE = ModelShape(num_layers=30, num_kv_heads=3, head_size=64, hidden_size=576)
MODEL = ServedModel("random", "0" * 64, "1" * 64, SMOLLM2_SHAPE)
DOMAIN_COUNTS = (1, 100, 1000)
console = Console()


def card(name: str) -> Card:
    questions = tuple(f"{name}: question number {n}?" for n in range(8))
    return Card(
        name=name, title=name.title(), description=f"Questions about {name}.", brief="Answer briefly.", examples=questions
    )


def random_prompt(shape: ModelShape, kind: Kind = "prefix_kv", num_virtual_tokens: int = 32, seed: int = 0) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    return SoftPrompt(kind, torch.randn(expected_shape(kind, num_virtual_tokens, shape), generator=generator) * 0.02)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def milliseconds(seconds: Sequence[float]) -> list[str]:
    """p50, p99 and the largest."""
    return [f"{1000 * value:.3f}" for value in (percentile(seconds, 0.5), percentile(seconds, 0.99), max(seconds))]


async def timed(action: Callable[[], Awaitable[object]], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        await action()
        seconds.append(time.perf_counter() - started)
    return seconds


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def bytes_per_version(folder: Path) -> None:
    table = Table(
        "kind", "virtual tokens", "on disk", "in Redis", "as prefix KV in bf16", title="Bytes per version (default model)"
    )
    store = FolderStore(folder / "brief")
    files = store.read_files(store.add_version(Draft(card("banking"), MODEL), "bench", "bench"))
    table.add_row("brief only", "0", f"{sum(map(len, files.values())):,}", "0", "0")
    for kind in KINDS:
        for num_virtual_tokens in (16, 32, 64, 128):
            store = FolderStore(folder / f"{kind}-{num_virtual_tokens}")
            prompt = random_prompt(SMOLLM2_SHAPE, kind, num_virtual_tokens)
            version = store.add_version(Draft(card("banking"), MODEL, prompt), "bench", "bench")
            on_disk = sum(map(len, store.read_files(version).values()))
            prefix_kv = torch.Size(expected_shape("prefix_kv", num_virtual_tokens, SMOLLM2_SHAPE)).numel() * 2
            sizes = (on_disk, len(prompt.to_bytes()), prefix_kv)
            table.add_row(kind, str(num_virtual_tokens), *(f"{size:,}" for size in sizes))
    console.print(table)


@asynccontextmanager
async def filled_bank(folder: Path, num_domains: int) -> AsyncIterator[tuple[Bank, BankSettings]]:
    """A bank with `num_domains` live domains of one version each; the last has a soft prompt of 32 virtual tokens."""
    settings = BankSettings(data_dir=folder, redis_url=None)
    async with open_bank(settings) as bank:
        for number in track(range(num_domains), f"filling {num_domains}", console=console, transient=True):
            prompt = random_prompt(SMOLLM2_SHAPE) if number == num_domains - 1 else None
            await bank.publish(Draft(card(f"domain-{number:04}"), MODEL, prompt), "bench", "bench")
            await bank.promote(f"domain-{number:04}", 1, "bench", "bench")
        yield bank, settings


async def at_scale(folder: Path, num_domains: int, count: int) -> list[tuple[str, list[float]]]:
    """Named series of seconds."""
    async with filled_bank(folder, num_domains) as (bank, settings), open_bank(settings) as other:
        domain = f"domain-{num_domains - 1:04}"
        store = FolderStore(settings.data_dir / "bank")
        version = await bank.live(domain, MODEL)

        async def resolve() -> None:
            table = await bank.claim_table()
            await bank.answering(table, domain, "conversation", MODEL)

        async def promote_and_see() -> None:
            await bank.promote(domain, 1, "bench", "bench")
            await other.claim_table()

        async def list_all() -> None:
            fresh = FolderStore(settings.data_dir / "bank")
            for name in fresh.domains():
                for number in fresh.versions(name):
                    fresh.read_version(name, number)

        async def open_table() -> None:
            FolderStore(settings.data_dir / "bank").pointer_table()

        async def from_store() -> None:
            store.read_soft_prompt(version, MODEL)

        async def claim_and_route() -> None:
            (await bank.claim_table()).live_versions(MODEL.fingerprint)

        async def claim_many() -> None:
            await asyncio.gather(*(bank.claim_table() for _ in range(32)))

        series = [
            ("pointer read of a turn (claim)", await timed(bank.claim_table, count * 20)),
            ("pointer read over TCP on loopback", await over_tcp(bank, store, count * 20)),
            ("claim and the live versions to route among", await timed(claim_and_route, count * 4)),
            ("resolve a domain to its version", await timed(resolve, count * 4)),
            ("promote", await timed(lambda: bank.promote(domain, 1, "bench", "bench"), count)),
            ("promote and seen by another process's bank", await timed(promote_and_see, count)),
            ("list every version", await timed(list_all, 3)),
            ("open the pointer table", await timed(open_table, 5)),
            ("cold load from Redis", await timed(lambda: bank.soft_prompt(version, MODEL), count)),
            ("cold load from the store", await timed(from_store, count)),
        ]
        await RedisCache(bank.cache.redis, store.id, 60).begin_change()  # and its author dies
        return [
            *series,
            ("pointer read while a change is pending", await timed(bank.claim_table, count * 4)),
            ("32 of them at once", await timed(claim_many, max(5, count // 10))),
        ]


async def over_tcp(bank: Bank, store: FolderStore, count: int) -> list[float]:
    """The same claims through the server's TCP port, which is opened for them."""
    redis = bank.cache.redis
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    await redis.config_set("port", port)
    cache = RedisCache.connect(f"redis://127.0.0.1:{port}", store.id, blob_ttl_s=60, timeout_s=5)
    try:
        far = Bank(store, cache)
        await far.start()
        return await timed(far.claim_table, count)
    finally:
        await cache.aclose()
        await redis.config_set("port", 0)


def promote_in_a_loop(folder: Path, begin: Barrier, seconds: float, at: int) -> int:
    """What one of several processes does: promotes two versions of its domain in turn; gives how many times."""

    async def run() -> int:
        async with open_bank(BankSettings(data_dir=folder)) as bank:
            domain = f"domain-{at:04}"
            for _ in range(2):
                await bank.publish(Draft(card(domain), MODEL), "bench", "bench")
            begin.wait()
            started, num_done = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                await bank.promote(domain, num_done % 2 + 1, "bench", "bench")
                num_done += 1
            return num_done

    return asyncio.run(run())


async def promoting_processes(folder: Path, counts: Sequence[int], seconds: float) -> None:
    table = Table("processes", "promotes a second", title="Processes that promote at once, each its own domain's two versions")
    loop, fresh = asyncio.get_running_loop(), get_context("spawn")
    for count in counts:
        data_dir = folder / str(count)
        async with open_bank(BankSettings(data_dir=data_dir)):
            with fresh.Manager() as manager, ProcessPoolExecutor(count, fresh) as pool:
                begin = manager.Barrier(count)
                running = [loop.run_in_executor(pool, promote_in_a_loop, data_dir, begin, seconds, at) for at in range(count)]
                table.add_row(str(count), f"{sum(await asyncio.gather(*running)) / seconds:,.0f}")
    console.print(table)


async def scale(folder: Path, counts: Sequence[int], count: int) -> None:
    table = Table("milliseconds", "domains", "p50", "p99", "max", "a second", title="The bank at scale")
    for num_domains in counts:
        for name, seconds in await at_scale(folder / str(num_domains), num_domains, count):
            table.add_row(name, f"{num_domains:,}", *milliseconds(seconds), f"{len(seconds) / sum(seconds):,.0f}")
    console.print(table)


async def publish_to_served(folder: Path, count: int) -> None:
    """From the call of publish() to the first streamed chunk of a running service that carries the new version."""
    settings = Settings(data_dir=folder)
    loaded = await asyncio.to_thread(load_model, settings)
    seconds = []
    async with serving(settings, lambda _: None) as url, open_bank(settings) as bank, httpx.AsyncClient(base_url=url) as client:
        parent = await bank.live("banking", loaded.served)
        for seed in range(count):
            prompt = random_prompt(loaded.served.shape, KINDS[seed % 2], seed=seed)
            started = time.perf_counter()
            version = await bank.publish(Draft(parent.card, loaded.served, prompt), "bench", "bench")
            await bank.promote("banking", version.manifest.version, "bench", "bench")
            body = {"model": "banking", "stream": True, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
            async with client.stream("POST", "/v1/chat/completions", json=body, timeout=60) as response:
                first = await anext(response.aiter_lines())
            seconds.append(time.perf_counter() - started)
            assert f'"version": {version.manifest.version}' in first
    table = Table("milliseconds", "p50", "p99", "max", title=f"Publish to first served answer ({count} versions, real model)")
    table.add_row("publish() called to first chunk received", *milliseconds(seconds))
    console.print(table)


async def table_growth(folder: Path) -> float:
    """Megabytes that a process takes for the pointer table, manifests and cards of every live domain."""
    gc.collect()
    before = resident_mb()
    async with open_bank(BankSettings(data_dir=folder)) as bank:
        table = await bank.claim_table()
        await bank.cards(table.live_versions(MODEL.fingerprint))
        return resident_mb() - before


async def router_growth(folder: Path) -> float:
    """Megabytes that the router takes on top, fitted on every live domain; the encoder itself is there before."""
    encoder = Encoder.from_models_dir(BankSettings().models_dir)
    encoder.encode(["warm"])
    async with open_bank(BankSettings(data_dir=folder)) as bank:
        live = (await bank.claim_table()).live_versions(MODEL.fingerprint)
        await bank.cards(live)
        gc.collect()
        before = resident_mb()
        router = LiveRouter(bank, encoder)
        await router.fitted(live)
        gc.collect()
        return resident_mb() - before


async def prefix_growth(budget_mb: int, num_domains: int) -> float:
    """Megabytes that the engine's prefix store takes once every domain was answered with 32 virtual tokens."""
    base = load_model(BankSettings()).base

    async def convert(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("there are no embeds")

    store = PrefixStore(base, budget_mb * 2**20, convert)
    gc.collect()
    before = resident_mb()
    for seed in range(num_domains):
        (await store.acquire(PromptRef.of(random_prompt(base.shape, seed=seed)))).release()
    gc.collect()
    return resident_mb() - before


def in_process(measure: Callable[..., Awaitable[float]], *arguments: object) -> float:
    async def run() -> float:
        return await measure(*arguments)

    return asyncio.run(run())


async def memory(folder: Path, num_domains: int, quick: bool) -> None:
    """What a serving process holds for many live domains, each figure from a fresh process; quickly, all from one."""
    rows = Table("memory", "MB", title=f"RAM for {num_domains:,} domains")
    loop = asyncio.get_running_loop()
    budget_mb, dtype = Settings().prefix_cache_mb, str(pick_dtype(torch.device(pick_device()))).removeprefix("torch.")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=None if quick else 1) as pool:

        async def add_row(name: str, measure: Callable[..., Awaitable[float]], *arguments: object) -> None:
            rows.add_row(name, f"{await loop.run_in_executor(pool, in_process, measure, *arguments):.0f}")

        async with filled_bank(folder, num_domains):
            await add_row("pointer table, manifests and cards", table_growth, folder)
            await add_row("the router's vectors and weights", router_growth, folder)
        allowed = f"{budget_mb} MB allowed (FRONTDESK_PREFIX_CACHE_MB)"
        await add_row(f"prefix KV in {dtype}, {allowed}", prefix_growth, budget_mb, num_domains)
        await add_row(f"prefix KV in {dtype}, all allowed", prefix_growth, 4096, num_domains)
    console.print(rows)


async def run(quick: bool) -> None:
    counts, count = ((1, 10), 10) if quick else (DOMAIN_COUNTS, 200)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bytes_per_version(folder / "bytes")
        await scale(folder / "scale", counts, count)
        await promoting_processes(folder / "promoting", (2,) if quick else (1, 2, 4, 8), 0.5 if quick else 5)
        await memory(folder / "memory", counts[-1], quick)
        await publish_to_served(folder / "served", 2 if quick else 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few domains and repetitions: whether it runs, not how fast")
    asyncio.run(run(parser.parse_args().quick))


if __name__ == "__main__":
    main()
