"""The SQL database of an installation: SQLite in a file unless PostgreSQL is named. Opens it and brings it up to date."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Insert, Table, event, inspect, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from prompt_bank.errors import LogUnavailableError, ServiceError

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
_READ_ONLY = "frontdesk_read_only"
_BEFORE_MIGRATIONS = "0001"  # the tables of a log that records no revision
_MIGRATION_LOCK = 4_701_137  # any number, the same in all processes
_POOL_SIZE = 10
_SQLITE_OPTIONS: dict[str, Any] = {}
_TIMEOUT_S = 10.0  # of a connection or a command of PostgreSQL, but for migrations: a large log takes longer
_MAX_WAIT_S = 10.0  # of a writer, in SQLite


class Database:
    """Transactions on an installation's database. Safe to use from many tasks of one event loop."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._writer = asyncio.Lock()  # in the order they came

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    def insert_if_new(self, table: Table) -> Insert:
        """An INSERT that does nothing where a row with the same key is there already."""
        if self.is_sqlite:
            return sqlite.insert(table).on_conflict_do_nothing()
        return postgresql.insert(table).on_conflict_do_nothing()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction; in SQLite it holds the write lock from its start. Raises LogUnavailableError."""
        with _translated_errors():
            async with self._turn_to_write() if self.is_sqlite else nullcontext(), self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def _turn_to_write(self) -> AsyncIterator[None]:
        """SQLite takes one writer at a time. Waiting for it in its own way is polling, in no order, with a connection each."""
        try:
            async with asyncio.timeout(_MAX_WAIT_S):
                await self._writer.acquire()
        except TimeoutError:
            raise LogUnavailableError(f"the conversation log was not free to write within {_MAX_WAIT_S:g} s") from None
        try:
            yield
        finally:
            self._writer.release()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that keeps nobody from writing. Raises LogUnavailableError."""
        with _translated_errors():
            async with self._engine.connect() as connection:
                yield await connection.execution_options(**{_READ_ONLY: True})


@asynccontextmanager
async def open_database(url: str) -> AsyncIterator[Database]:
    """The database at `url`, with the schema of this code. Raises ServiceError when it cannot be opened or is newer."""
    await _migrated(_engine(url, command_timeout_s=None))
    engine = _engine(url, command_timeout_s=_TIMEOUT_S)
    try:
        yield Database(engine)
    finally:
        await engine.dispose()


async def _migrated(engine: AsyncEngine) -> None:
    try:
        async with engine.begin() as connection:
            await connection.run_sync(migrate)
    except (SQLAlchemyError, OSError, CommandError) as error:
        raise _cannot_open(engine, error) from error
    finally:
        await engine.dispose()


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"


def _engine(url: str, command_timeout_s: float | None) -> AsyncEngine:
    # Without parameters in its errors: they are what people wrote, and errors go to the operator's log.
    try:
        parsed = make_url(url)
        driver = _DRIVERS[parsed.drivername]
        options = _SQLITE_OPTIONS if driver.startswith("sqlite") else _postgresql_options(parsed, command_timeout_s)
        target = parsed.set(drivername=driver).difference_update_query(["sslmode"])
        engine = create_async_engine(target, hide_parameters=True, pool_size=_POOL_SIZE, **options)
    except (ArgumentError, KeyError, TypeError, ValueError):
        # Not with its cause, which may hold a part of the password.
        raise ServiceError(
            "setting FRONTDESK_DATABASE_URL is not the URL of a database; expected sqlite:///FILE or "
            "postgresql://USER:PASSWORD@HOST/DATABASE, with what is special in a URL written as %40 and the like"
        ) from None
    if engine.dialect.name == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        event.listen(engine.sync_engine, "connect", _set_pragmas)
        event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _postgresql_options(url: URL, command_timeout_s: float | None) -> dict[str, Any]:
    """A server may have been restarted since a connection was last used, and a network may swallow what is sent."""
    times = {"timeout": _TIMEOUT_S, "command_timeout": command_timeout_s}
    sslmode = url.query.get("sslmode")  # what libpq's URLs say, and asyncpg takes as `ssl`
    return {
        "pool_pre_ping": True,
        "pool_timeout": _TIMEOUT_S,
        "connect_args": {**times, **({"ssl": sslmode} if sslmode else {})},
    }


def _cannot_open(engine: AsyncEngine, error: Exception) -> ServiceError:
    reason = getattr(error, "orig", None) or error  # the driver's own words, without SQLAlchemy's link
    if isinstance(error, CommandError):
        reason = "it was written by a newer Frontdesk; install that one"
    if engine.dialect.name == "sqlite":
        return ServiceError(f"the conversation log {engine.url.database} cannot be opened: {reason}; mend or move the file")
    place = engine.url.set(query={}).render_as_string(hide_password=True)
    return ServiceError(f"the conversation log at {place} cannot be opened: {reason}; see FRONTDESK_DATABASE_URL")


def migrate(connection: Connection) -> None:
    """Brings the schema to the newest revision, in the caller's transaction; several processes may do so at once."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
    config = Config()
    config.set_main_option("script_location", str(files("bot.conversations") / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    tables = inspect(connection).get_table_names()
    if "turns" in tables and "alembic_version" not in tables:
        command.stamp(config, _BEFORE_MIGRATIONS)
    command.upgrade(config, "head")


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
    except (SQLAlchemyError, OSError) as error:  # asyncpg lets the network's own errors through
        raise LogUnavailableError(f"the conversation log does not answer: {getattr(error, 'orig', None) or error}") from error
