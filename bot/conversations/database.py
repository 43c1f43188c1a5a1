"""The SQL database of an installation: SQLite in a file. Opens it and gives transactions on it."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from bot.conversations.schema import metadata
from prompt_bank.errors import LogUnavailableError, ServiceError

_READ_ONLY = "frontdesk_read_only"


class Database:
    """Transactions on an installation's database. Safe to use from many tasks of one event loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that holds the write lock from its start. Raises LogUnavailableError."""
        with _translated_errors():
            async with self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that keeps nobody from writing. Raises LogUnavailableError."""
        with _translated_errors():
            async with self._engine.connect() as connection:
                yield await connection.execution_options(**{_READ_ONLY: True})


@asynccontextmanager
async def open_database(path: Path) -> AsyncIterator[Database]:
    """The SQLite file at `path`, made when it is not there. Raises ServiceError when it cannot be opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without parameters in its errors: they are what people wrote, and errors go to the operator's log.
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", hide_parameters=True)
    event.listen(engine.sync_engine, "connect", _set_pragmas)
    event.listen(engine.sync_engine, "begin", _begin)
    try:
        try:
            async with engine.begin() as connection:
                await connection.run_sync(metadata.create_all)
        except SQLAlchemyError as error:
            reason = getattr(error, "orig", None) or error  # the driver's own words, without SQLAlchemy's link
            raise ServiceError(f"the conversation log {path} cannot be opened: {reason}; mend or move the file") from error
        yield Database(engine)
    finally:
        await engine.dispose()


def _set_pragmas(connection: Any, _: object) -> None:
    # The driver must leave BEGIN to us, or a transaction would start only at its first write.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Any) -> None:
    # A transaction that reads and then writes would fail with "database is locked" if another wrote in between.
    is_read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # the caller's own mistake: it knows which
    except SQLAlchemyError as error:
        raise LogUnavailableError(f"the conversation log does not answer: {getattr(error, 'orig', None) or error}") from error
