"""A local server that speaks the few routes of the Hugging Face hub that a download needs."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40


@dataclass
class Hub:
    """`files` by (revision's commit, name). `requests` are the methods and paths that were asked for."""

    url: str = ""
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLD_COMMIT})
    declared_bytes: int | None = None
    status: int = 200
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            hub.requests.append((self.command, self.path))
            if hub.status != 200:
                self._send(hub.status, {})
                return
            parts = self.path.strip("/").split("/")
            if parts[:2] != ["acme", "banking-prompt"] or len(parts) != 5 or parts[2] != "resolve":
                self._send(404, {"X-Error-Code": "RepoNotFound"})
                return
            commit = hub.revisions.get(parts[3], parts[3])
            if commit not in hub.revisions.values():
                self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return
            content = hub.files.get((commit, parts[4]))
            if content is None:
                self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            etag = hashlib.sha256(content).hexdigest()
            size = len(content) if with_body or hub.declared_bytes is None else hub.declared_bytes
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Content-Length": str(size)}
            self._send(200, headers, content if with_body else b"")

        def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": "0"} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=[0.02])
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
