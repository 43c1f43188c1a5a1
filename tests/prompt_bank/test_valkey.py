"""The embedded Valkey: shared by processes, stopped by the last, its data durable."""

import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis

from prompt_bank.errors import ServiceError
from prompt_bank.valkey import embedded_valkey

# Another process that uses the server of a folder until a line comes in.
USER = """
import sys
from pathlib import Path
from prompt_bank.valkey import embedded_valkey
with embedded_valkey(Path(sys.argv[1])) as url:
    print(url, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def other_process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-W", "error", "-c", USER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        try:
            yield user, user.stdout.readline().strip()
        finally:
            user.kill()


def server_pid(url: str) -> int:
    with Redis.from_url(url) as client:
        return int(client.info("server")["process_id"])


def wait_for_end(pid: int) -> None:
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([ended], [], [], 10)[0], f"process {pid} goes on"
    finally:
        os.close(ended)


def is_running(pid: int) -> bool:
    """False for a zombie too."""
    try:
        state = re.sub(r".*\) ", "", Path(f"/proc/{pid}/stat").read_text())[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_starting_and_stopping_is_quick(tmp_path: Path) -> None:
    """redis-py would by itself retry for seconds where no server is."""
    start = time.monotonic()
    with embedded_valkey(tmp_path) as url:
        pid = server_pid(url)
    assert time.monotonic() - start < 3
    assert not is_running(pid)


def test_last_to_leave_stops_the_server(tmp_path: Path) -> None:
    with other_process(tmp_path) as (user, url):
        pid = server_pid(url)
        with embedded_valkey(tmp_path) as same_url:
            assert same_url == url
            assert server_pid(url) == pid
        assert is_running(pid)
        user.communicate("\n", timeout=20)
        assert user.returncode == 0
        wait_for_end(pid)


def test_user_that_started_it_may_leave_first(tmp_path: Path) -> None:
    with other_process(tmp_path) as (user, url):
        with embedded_valkey(tmp_path):
            user.communicate("\n", timeout=20)
            pid = server_pid(url)
        wait_for_end(pid)


def test_users_of_one_process_share_it_too(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        pid = server_pid(url)
        with embedded_valkey(tmp_path):
            assert server_pid(url) == pid
        assert server_pid(url) == pid
    assert not is_running(pid)


def test_killed_user_does_not_keep_the_server_up(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        with other_process(tmp_path) as (user, _):
            user.send_signal(signal.SIGKILL)
            user.wait(10)
        pid = server_pid(url)
    assert not is_running(pid)


def test_server_left_by_a_killed_user_is_attached_to_and_stopped(tmp_path: Path) -> None:
    with other_process(tmp_path) as (user, url):
        pid = server_pid(url)
        user.send_signal(signal.SIGKILL)
        user.wait(10)
    assert is_running(pid)
    with embedded_valkey(tmp_path) as same_url:
        assert server_pid(same_url) == pid
    wait_for_end(pid)


def test_data_survives_a_restart(tmp_path: Path) -> None:
    for count in range(1, 4):
        with embedded_valkey(tmp_path) as url, Redis.from_url(url) as client:
            assert client.incr("starts") == count


def test_data_survives_the_server_s_death_and_a_user_may_start_it_again(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        with Redis.from_url(url) as client:
            client.set("kept", "yes")
        os.kill(server_pid(url), signal.SIGKILL)
        with embedded_valkey(tmp_path) as same_url, Redis.from_url(same_url) as client:
            assert client.get("kept") == b"yes"


def test_server_is_in_its_own_session_and_its_socket_is_its_owner_s(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url:
        pid = server_pid(url)
        assert os.getsid(pid) == pid != os.getsid(0)
        socket = Path(url.removeprefix("unix://"))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700


def test_settings_keep_pointers_and_acknowledged_messages(tmp_path: Path) -> None:
    with embedded_valkey(tmp_path) as url, Redis.from_url(url) as client:
        settings = client.config_get("*")
    expected = {"maxmemory-policy": "volatile-lru", "appendonly": "yes", "appendfsync": "always", "port": "0"}
    assert {name: settings[name] for name in expected} == expected


def test_long_data_path_uses_a_short_socket_path(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25) / ("é" * 40)
    with embedded_valkey(folder) as url:
        assert len(url.removeprefix("unix://").encode()) < 100
        with embedded_valkey(folder) as same_url, Redis.from_url(same_url) as client:
            assert same_url == url
            assert client.ping()


def test_second_server_is_never_started_over_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is stopped or slow does not answer, but it still writes its append-only file."""
    monkeypatch.setattr("prompt_bank.valkey._TIMEOUT_S", 0.5)
    with embedded_valkey(tmp_path) as url:
        pid = server_pid(url)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServiceError, match=r"runs in .* but does not answer"), embedded_valkey(tmp_path):
                pass
        finally:
            os.kill(pid, signal.SIGCONT)
        assert server_pid(url) == pid


def test_server_that_does_not_start_is_told_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("in the way")
    with pytest.raises(ServiceError, match=r"the embedded Valkey did not start \(exit status 1\); see .*valkey\.log"):  # noqa: SIM117
        with embedded_valkey(tmp_path):
            pass
    (tmp_path / "appendonlydir").unlink()
    with embedded_valkey(tmp_path) as url:
        assert server_pid(url)
