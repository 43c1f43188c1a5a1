"""Runs the service behind uvicorn: binds first, opens the service, serves, drains, closes."""

import asyncio
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import uvicorn

from bot.app import EngineFactory, Service, open_service, torch_engine
from bot.channels.http.api import create_app
from bot.channels.http.bounds import Bounded, Bounds
from bot.channels.http.connection import HttpConnection
from bot.settings import Settings
from prompt_bank.errors import ServiceError
from prompt_bank.model_files import Report

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75  # longer than what load balancers usually keep, so that they are who closes


class _Server(uvicorn.Server):
    """uvicorn raises a caught signal again when it is done, which would end the process before our resources are closed."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    def stop(self) -> None:
        """The first call lets requests under way finish, the second does not."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # uvicorn does not wait for what it cancels when time is up, and cancels nothing when it is forced.
        left = list(self.server_state.tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def bind(settings: Settings) -> socket.socket:
    """Raises ServiceError when the address is taken; done before the model is loaded, so that it is told at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol by its number: for one of number 0 asyncio sets no TCP_NODELAY, and a piece of an answer waits up to 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen()  # or a second service could bind too; who connects early waits until this one is ready
    except OSError as error:
        listener.close()
        raise ServiceError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); stop what is there or set FRONTDESK_PORT"
        ) from error
    return listener


async def serve(settings: Settings, report: Report, started: float, make_engine: EngineFactory = torch_engine) -> None:
    """Serves until SIGINT or SIGTERM; a second signal does not wait for answers under way.

    `started` is when the command began (time.monotonic), so that the time to readiness counts imports too.
    """
    raise_file_limit()
    with bind(settings) as listener:
        address, port = listener.getsockname()[:2]

        def say_ready() -> None:
            report(f"ready in {time.monotonic() - started:.1f} s on http://{address}:{port}")

        opening = asyncio.current_task()
        assert opening is not None
        _call_on_signals(opening.cancel)  # else SIGTERM would end us at once and leave the embedded Valkey running
        try:
            async with open_service(settings, report, make_engine) as service:
                # What is there now stays: looking through all of it again and again held everybody up for 250 ms each time.
                gc.collect()
                gc.freeze()
                server = _Server(_config(_app(service, settings), settings), say_ready)
                _call_on_signals(lambda: _stop(server, service, settings.drain_s))
                await server.serve(sockets=[listener])
        except asyncio.CancelledError:
            raise ServiceError("stopped before it was ready") from None


def _stop(server: _Server, service: Service, drain_s: float) -> None:
    """The first call lets answers under way finish, the second does not."""
    service.worker.drain(0.0 if server.should_exit else drain_s)
    server.stop()


def _call_on_signals(stop: Callable[[], object]) -> None:
    """From now on; the loop forgets it when it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)


@asynccontextmanager
async def serving(settings: Settings, report: Report) -> AsyncIterator[str]:
    """A service of this process on a free port of the loopback address; gives its URL."""
    local = settings.model_copy(update={"host": "127.0.0.1", "port": 0})
    with bind(local) as listener:
        started = asyncio.get_running_loop().create_future()
        async with open_service(local, report) as service:
            server = _Server(_config(_app(service, local), local), lambda: started.set_result(None))
            # Not a task group: it would wrap the errors of whoever uses this service.
            running = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                await asyncio.wait({running, started}, return_when=asyncio.FIRST_COMPLETED)
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                _stop(server, service, local.drain_s)
                await running


def _app(service: Service, settings: Settings) -> Bounded:
    bounds = Bounds(settings.max_body_bytes, settings.request_timeout_s, settings.max_open_requests)
    return Bounded(create_app(service), bounds)


def raise_file_limit() -> None:
    """Every connection is an open file, and the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a hard limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _config(app: object, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=partial(HttpConnection, settings.request_timeout_s),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_s) + 1,
    )
