"""Measures the service without a model: requests a second, and the latency it adds to a scripted engine's.

    python -m tests.benchmarks.bench_server [--quick] [--json FILE] [--tokens N] [--pace MS]

The service is a process of its own, its answers are scripted (see scripted_engine), and so is what each must take; the rest is
added. The load comes from this process over loopback. `paced` connections think for some seconds between two questions, as
people do; `closed` ones ask again at once, so that with many of them the processor is full and the latency is the queue's.
"Nothing" is a bare server that sends the same pieces: what client and loopback cost alone. Times depend on the machine and on
what else it does: compare figures of one run.

What an answer waits for: a commit of the log (one for a completion, after its last token; two for a held message, one of them
before its first) and, for a held message, Valkey's append-only file with `appendfsync always` (put, claim, each event, finish).
Each is one fsync of the data folder's disk: 4 ms on the disk of the machine this was written on, where it is most of what a
held message waits for. `--memory` puts the data into /dev/shm, which leaves the service's own time.

What helped, 100 connections that think for 4 s, first token added at p50 / p95 / p99 (ms). TCP_NODELAY, which asyncio sets
only on sockets that name their protocol: 41 less for a lone connection. Freezing what the garbage collector need not look at
again: a completion's p99 from 240 to 8. For held messages, to their `turn.started`, 45 / 294 / 339 before: wake-ups that
carry the event, text that waits for no event, one transaction instead of three to take a message up: 19 / 92 / 127; uvloop,
httptools and hiredis: 13 / 56 / 80; text told at most 25 times a second: 12 / 36 / 47 (to the first text 14 / 35 / 57). Of
uvloop, httptools and hiredis alone, each saved 5 to 10% of the processor's time.

What did not help: data in memory instead of on a disk whose fsync takes 0.1 ms. Past saturation refusals cost as much as the
loop has: 1,000 clients that come back a hundred times sooner than they are told are refused after 0.6 s each, and few are
answered.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from prompt_bank.settings import BankSettings
from tests.benchmarks.bench_inbox import claims
from tests.benchmarks.filled_log import postgresql
from tests.benchmarks.load import Call, Outcome, Run, connected, load

_START_TIMEOUT_S = 120
_MESSAGES = [{"role": "user", "content": "Where is my card? I ordered it a week ago."}]
_DOMAIN = "banking"
console = Console(width=150)  # a row has more than a pipe is taken to show
_progress = Console(stderr=True)


def say(text: str) -> None:
    _progress.print(f"[dim]{time.strftime('%X')} {text}")


@dataclass(frozen=True, slots=True)
class Script:
    """What an answer takes by itself."""

    num_tokens: int
    pace_s: float

    def added(self, outcome: Outcome, is_streamed: bool) -> tuple[float, float]:
        """Milliseconds to the first token and to the end, beyond the engine's own."""
        total_s = outcome.total_s - self.num_tokens * self.pace_s
        return 1000 * (outcome.first_s - self.pace_s if is_streamed else total_s), 1000 * total_s


@dataclass(frozen=True, slots=True)
class Served:
    port: int
    pid: int

    @property
    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_kb(self) -> float:
        return int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


@contextmanager
def scripted_service(folder: Path, script: Script, **settings: str) -> Iterator[Served]:
    """In a process of its own, until it is stopped with SIGTERM."""
    given = {"FRONTDESK_DATA_DIR": str(folder), "FRONTDESK_PORT": "0", "FRONTDESK_LOG_LEVEL": "error", **settings}
    given |= {"FRONTDESK_MODELS_DIR": str(BankSettings().models_dir)}
    ours = {name: value for name, value in os.environ.items() if not name.startswith("FRONTDESK_")}
    command = [sys.executable, "-m", "tests.benchmarks.scripted_engine", str(script.num_tokens), str(1000 * script.pace_s)]
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "stderr.log"
    with log_file.open("wb") as stderr:
        process = subprocess.Popen(command, env={**ours, **given}, stderr=stderr)
    try:
        yield Served(_port(process, log_file), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: "subprocess.Popen[bytes]", log_file: Path) -> int:
    ends = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < ends:
        ready = [line for line in log_file.read_text(encoding="utf-8").splitlines() if "frontdesk ready in" in line]
        if ready:
            return int(ready[0].rpartition(":")[2])
        time.sleep(0.05)
    raise AssertionError(f"the service did not become ready:\n{log_file.read_text(encoding='utf-8')}")


def completion(is_streamed: bool) -> Call:
    body = {"model": _DOMAIN, "messages": _MESSAGES, "stream": is_streamed}
    marks = (b"data:", b"[DONE]") if is_streamed else (None, b'"finish_reason"')
    return Call.of("/v1/chat/completions", body, *marks)


async def held(served: Served, count: int) -> list[Call]:
    """A message in each of so many conversations."""
    calls = []
    async with served.http as http:
        for _ in range(count):
            made = await http.post("/v1/conversations", json={"domain": _DOMAIN})
            body = {"text": _MESSAGES[0]["content"], "stream": True}
            path = f"/v1/conversations/{made.raise_for_status().json()['id']}/messages"
            calls.append(Call.of(path, body, b"turn.delta", b"turn.completed"))
    return calls


async def calls_of(served: Served, kind: str, count: int) -> list[Call]:
    return await held(served, count) if kind == "held" else [completion(kind == "streamed")] * count


def percentiles(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95, 0.99)]


def figures(run: Run, script: Script, is_streamed: bool, cpu_s: float) -> dict[str, Any]:
    added = [script.added(outcome, is_streamed) for outcome in run.outcomes if outcome.is_whole]
    if not added:
        return {"requests": len(run.outcomes), "failed": run.num_failed}
    return {
        "requests": len(run.outcomes),
        "failed": run.num_failed,
        "requests_per_s": len(run.outcomes) / run.elapsed_s,
        "first_token_added_ms": percentiles([first for first, _ in added]),
        "total_added_ms": percentiles([total for _, total in added]),
        "server_cpu_ms": 1000 * cpu_s / len(run.outcomes),
        "client_cpu_ms": 1000 * run.client_cpu_s / len(run.outcomes),
    }


async def latencies(served: Served, script: Script, loads: Sequence[tuple[int, float]], seconds: float) -> list[dict[str, Any]]:
    """One row for each kind of request and each (number of connections, seconds of thought)."""
    rows = []
    for count, think_s in loads:
        for kind in ("streamed", "whole", "held"):
            say(f"{count} connections, {kind}")
            calls, before = await calls_of(served, kind, count), served.cpu_s()
            run = await load(served.port, calls, seconds=max(seconds, 2 * think_s), think_s=think_s, most=50_000)
            row = figures(run, script, kind != "whole", served.cpu_s() - before)
            rows.append({"kind": kind, "connections": count, "pacing": f"{think_s:g} s" if think_s else "closed", **row})
    return rows


@contextmanager
def plain_server(script: Script) -> Iterator[Served]:
    command = [sys.executable, "-m", "tests.benchmarks.load", str(script.num_tokens), str(script.pace_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield Served(int(process.stdout.readline()), process.pid)
        finally:
            process.kill()


async def nothing(script: Script, loads: Sequence[tuple[int, float]], seconds: float) -> list[dict[str, Any]]:
    """The same loads on a server with nothing behind it, in a process of its own."""
    call, rows = completion(is_streamed=True), []
    with plain_server(script) as served:
        for count, think_s in loads:
            before = served.cpu_s()
            run = await load(served.port, [call] * count, seconds=max(seconds, 2 * think_s), think_s=think_s, most=50_000)
            row = figures(run, script, True, served.cpu_s() - before)
            rows.append({"kind": "nothing", "connections": count, "pacing": f"{think_s:g} s" if think_s else "closed", **row})
    return rows


async def memory_of_streams(served: Served, count: int) -> dict[str, float]:
    """Kilobytes of the service for each idle follower of a conversation's events."""
    async with served.http as http:
        made = await http.post("/v1/conversations", json={"domain": _DOMAIN})
    path = f"/v1/conversations/{made.json()['id']}/events"
    before = served.resident_kb()
    followers = await connected(served.port, count)
    try:
        call = Call(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode(), b": here", b"")
        await asyncio.gather(*(follower.follow(call) for follower in followers))
        return {"streams": count, "kb_a_stream": (served.resident_kb() - before) / count}
    finally:
        for follower in followers:
            follower.close()


async def saturation(folder: Path, script: Script, count: int, seconds: float) -> dict[str, Any]:
    """Far more than it takes: how soon the rest is refused, what memory does, and what it does afterwards."""
    bounds = {"FRONTDESK_MAX_BATCH": "8", "FRONTDESK_MAX_WAITING": "8"}
    with scripted_service(folder, script, **bounds) as served:
        calls = [completion(is_streamed=True)] * count
        calm = await load(served.port, calls[:8], seconds=seconds, think_s=0, most=50_000)
        before = served.resident_kb()
        flood = await load(served.port, calls, seconds=seconds, think_s=0, most=50_000)
        after = served.resident_kb()
        again = await load(served.port, calls[:8], seconds=seconds, think_s=0, most=50_000)
    refused = [outcome for outcome in flood.outcomes if outcome.status == 503]
    return {
        "connections": count,
        "refused": len(refused),
        "refused_with_retry_after": sum(outcome.retry_after for outcome in refused),
        "refused_after_ms": percentiles([1000 * outcome.total_s for outcome in refused]) if refused else None,
        "answered_per_s": [run.num_whole / run.elapsed_s for run in (calm, flood, again)],
        "resident_grew_mb": (after - before) / 1024,
    }


@contextmanager
def databases(folder: Path) -> Iterator[dict[str, dict[str, str]]]:
    """Settings that name each."""
    with postgresql(folder / "postgresql") as url:
        yield {"sqlite": {}, "postgresql": {"FRONTDESK_DATABASE_URL": url}}


def told(name: str, row: dict[str, Any]) -> list[str]:
    def three(key: str) -> str:
        return " / ".join(f"{value:.1f}" for value in row.get(key, ()))

    return [
        *(name, row["kind"], f"{row['connections']:,}", row["pacing"], f"{row.get('requests_per_s', 0):.1f}"),
        *(three("first_token_added_ms"), three("total_added_ms"), f"{row.get('server_cpu_ms', 0):.1f}"),
        *(f"{row.get('client_cpu_ms', 0):.2f}", str(row["failed"])),
    ]


async def run(
    script: Script, loads: Sequence[tuple[int, float]], seconds: float, process_counts: Sequence[int], parent: Path | None
) -> dict[str, Any]:
    most = max(count for count, _ in loads)
    with tempfile.TemporaryDirectory(dir=parent) as name, databases(Path(name)) as choices:
        say("nothing behind it")
        result: dict[str, Any] = {"nothing": await nothing(script, loads, seconds)}
        for database, settings in choices.items():
            say(f"the log in {database}")
            with scripted_service(Path(name) / database, script, **settings) as served:
                await latencies(served, script, [(1, 0.0)], 1.0)  # the first of everything is slow
                result[database] = await latencies(served, script, loads, seconds)
        say("memory, saturation, then the inbox alone")
        with scripted_service(Path(name) / "memory", script) as served:  # one that has not been full before
            result["memory"] = await memory_of_streams(served, most)
        result["saturation"] = await saturation(Path(name) / "saturated", script, most, seconds)
        result["inbox"] = {str(count): await claims(Path(name) / "inbox", count, seconds) for count in process_counts}
    return result


def show(result: dict[str, Any], script: Script) -> None:
    title = f"Added to {script.num_tokens} tokens, one each {1000 * script.pace_s:g} ms (ms at p50 / p95 / p99)"
    headings = (
        "log",
        "request",
        "connections",
        "thinks",
        "requests/s",
        "first token",
        "whole",
        "server ms",
        "client ms",
        "failed",
    )
    table = Table(*headings, title=title)
    for name in ("nothing", "sqlite", "postgresql"):
        for row in result[name]:
            table.add_row(*told("" if name == "nothing" else name, row))
    console.print(table)
    for name in ("memory", "saturation", "inbox"):
        console.print(f"[bold]{name}[/]", result[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few connections, little time: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--tokens", type=int, default=20, help="of an answer")
    parser.add_argument("--pace", type=float, default=20.0, help="milliseconds from one to the next")
    parser.add_argument("--memory", action="store_true", help="data in /dev/shm: without the disk")
    given = parser.parse_args()
    script = Script(given.tokens, given.pace / 1000)
    loads, seconds = [(1, 0.0), (100, 4.0), (100, 0.0), (1000, 20.0), (1000, 0.0)], 15.0
    process_counts: tuple[int, ...] = (1, 2, 4)
    if given.quick:
        script, loads, seconds, process_counts = Script(3, 0.005), [(1, 0.0), (40, 0.0)], 0.3, (1, 2)
    result = asyncio.run(run(script, loads, seconds, process_counts, Path("/dev/shm") if given.memory else None))
    show(result, script)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
