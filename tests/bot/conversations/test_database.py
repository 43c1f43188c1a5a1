"""Opening and migrating the database, on real servers of both kinds."""

import asyncio
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from bot.conversations.database import Database, open_database
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.conversations.records import Caller, TurnFilter
from bot.conversations.schema import metadata
from prompt_bank.conversation import Message
from prompt_bank.errors import LogUnavailableError, ServiceError

_OTHER_TABLES = ("turns_text", "alembic_version", "sqlite_sequence")


def raw_engine(url: str) -> AsyncEngine:
    scheme = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}[url.split(":")[0]]
    return create_async_engine(f"{scheme}:{url.partition(':')[2]}")


async def test_the_migrated_schema_is_the_one_of_the_code(database_url: str) -> None:
    def differences(connection: Connection) -> list[object]:
        options = {
            "include_object": lambda _, name, kind, *__: not (kind == "table" and name.startswith(_OTHER_TABLES)),
            "include_name": lambda name, kind, _: not (kind == "index" and name == "ix_turns_text"),
            "compare_server_default": True,
        }
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    async with open_database(database_url) as database, database.writing() as connection:
        assert await connection.run_sync(differences) == []
        await connection.execute(text("ALTER TABLE feedback ADD COLUMN surprise INTEGER"))
        assert len(await connection.run_sync(differences)) == 1  # so the comparison sees what it should


_BEFORE = """
CREATE TABLE conversations (id VARCHAR(64) PRIMARY KEY, key VARCHAR(255) NOT NULL UNIQUE, domain VARCHAR(48),
    transcript VARCHAR(64), created_at {time} NOT NULL);
CREATE INDEX ix_conversations_transcript ON conversations (transcript);
CREATE TABLE turns (id VARCHAR(64) PRIMARY KEY, conversation_id VARCHAR(64) NOT NULL REFERENCES conversations (id),
    position INTEGER NOT NULL, created_at {time} NOT NULL, system TEXT, question TEXT NOT NULL, answer TEXT NOT NULL,
    author VARCHAR(8) NOT NULL, domain VARCHAR(48), version INTEGER, digest VARCHAR(64), fingerprint VARCHAR(64) NOT NULL,
    routing_reason VARCHAR(32) NOT NULL, routing_score FLOAT, routing_scores JSON NOT NULL, num_prompt_tokens INTEGER NOT NULL,
    token_ids JSON NOT NULL, finish_reason VARCHAR(16) NOT NULL, first_token_ms FLOAT, total_ms FLOAT NOT NULL,
    UNIQUE (conversation_id, position));
CREATE INDEX ix_turns_domain_created ON turns (domain, created_at);
CREATE TABLE feedback (id {serial}, turn_id VARCHAR(64) NOT NULL REFERENCES turns (id), created_at {time} NOT NULL,
    vote VARCHAR(8) NOT NULL, reason TEXT, correction TEXT);
CREATE INDEX ix_feedback_turn ON feedback (turn_id);
CREATE TABLE shadow_answers (turn_id VARCHAR(64) PRIMARY KEY REFERENCES turns (id), created_at {time} NOT NULL,
    version INTEGER NOT NULL, digest VARCHAR(64), answer TEXT NOT NULL, token_ids JSON NOT NULL,
    finish_reason VARCHAR(16) NOT NULL, total_ms FLOAT NOT NULL);
INSERT INTO conversations VALUES ('c1', 'api/c1', 'banking', '{transcript}', '2026-11-01 10:00:00');
INSERT INTO turns VALUES ('t1', 'c1', 0, '2026-11-01 10:00:01', NULL, 'Where is my card?', 'On its way.', 'bot', 'banking', 1,
    NULL, 'f', 'routed', 0.9, '{{"banking": 0.9}}', 5, '[1, 2]', 'stop', 3.5, 9.5);
INSERT INTO feedback VALUES (7, 't1', '2026-11-01 10:01:00', 'down', 'vague', 'It comes on Monday.');
INSERT INTO shadow_answers VALUES ('t1', '2026-11-01 10:00:02', 2, NULL, 'Soon.', '[3]', 'stop', 8.0)
"""


async def test_a_log_from_before_the_migrations_keeps_everything(database_url: str) -> None:
    """A log that records no revision is taken for the first one."""
    from bot.conversations.log import transcript_digest

    said = [Message(role="user", content="Where is my card?"), Message(role="assistant", content="On its way.")]
    is_sqlite = database_url.startswith("sqlite")
    script = _BEFORE.format(
        time="DATETIME" if is_sqlite else "TIMESTAMP WITH TIME ZONE",
        serial="INTEGER PRIMARY KEY AUTOINCREMENT" if is_sqlite else "SERIAL PRIMARY KEY",
        transcript=transcript_digest(said),
    )
    old = raw_engine(database_url)
    async with old.begin() as connection:
        for statement in script.split(";\n"):
            await connection.exec_driver_sql(statement)
    await old.dispose()
    async with open_database(database_url) as database:
        log, reader = ConversationLog(database), LogReader(database)
        assert (await log.find(Caller("api"), "c1", [])).domain == "banking"  # type: ignore[union-attr]
        assert (await log.find(Caller("api"), None, said)).id == "c1"  # type: ignore[union-attr]
        (record,) = await reader.turns(TurnFilter(text="card"), limit=10)
        assert (record.turn.id, record.turn.answer, record.turn.token_ids) == ("t1", "On its way.", (1, 2))
        assert (record.vote, record.reason, record.correction) == ("down", "vague", "It comes on Monday.")
        assert record.shadow is not None
        assert record.shadow["answer"] == "Soon."
        assert record.created_at.isoformat() == "2026-11-01T10:00:01+00:00"
        await log.add_feedback("t1", "up", None, None)  # its number follows those that were there
        (again,) = await reader.turns(TurnFilter(), limit=10)
        assert again.vote == "up"


async def test_two_processes_may_open_a_new_database_at_once(database_url: str) -> None:
    async def open_one() -> int:
        async with open_database(database_url) as database:
            return len(await LogReader(database).turns(TurnFilter(), limit=1))

    assert await asyncio.gather(*(open_one() for _ in range(4))) == [0] * 4


async def test_opening_again_changes_nothing(database_url: str) -> None:
    for _ in range(2):
        async with open_database(database_url) as database, database.reading() as connection:
            revision = (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalar_one()
            assert revision == "0002"


async def test_a_log_of_a_newer_version_is_left_alone(database_url: str) -> None:
    async with open_database(database_url) as database, database.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ServiceError, match=r"written by a newer Frontdesk"):
        async with open_database(database_url):
            pass


async def test_a_failed_migration_leaves_the_log_as_it_was(database_url: str) -> None:
    """All steps are one transaction, in SQLite too."""
    old = raw_engine(database_url)
    async with old.begin() as connection:
        await connection.exec_driver_sql("CREATE TABLE turns (id VARCHAR(64) PRIMARY KEY, note TEXT)")
        await connection.exec_driver_sql("INSERT INTO turns VALUES ('x', 'not a log of ours')")
    with pytest.raises(ServiceError, match="cannot be opened"):
        async with open_database(database_url):
            pass
    async with old.connect() as connection:
        assert (await connection.exec_driver_sql("SELECT note FROM turns")).scalar_one() == "not a log of ours"
        assert await connection.run_sync(lambda sync: inspect(sync).get_table_names()) == ["turns"]
    await old.dispose()


@pytest.mark.parametrize(
    "url",
    ["nonsense", "mysql://user:secret@localhost/x", "postgresql+psycopg2://user:secret@host/x",
     "postgresql://user:sec@ret:secret@host/x", "postgresql://user:secret@host:port/x"],
)  # fmt: skip
async def test_a_url_that_is_none_is_named_without_its_password(url: str) -> None:
    with pytest.raises(ServiceError, match="FRONTDESK_DATABASE_URL") as raised:
        async with open_database(url):
            pass
    assert "secret" not in str(raised.value)


async def test_a_server_that_is_away_is_named_without_its_password() -> None:
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1") as raised:
        async with open_database("postgresql://user:secret@127.0.0.1:1/x"):
            pass
    assert "secret" not in str(raised.value)


async def test_a_url_of_libpq_says_whether_to_encrypt(postgresql_url: str) -> None:
    from tests.conftest import empty_postgresql

    url = empty_postgresql(postgresql_url)
    async with open_database(f"{url}&sslmode=prefer") as database:
        await ConversationLog(database).check()
    with pytest.raises(ServiceError, match="cannot be opened") as raised:
        async with open_database("postgresql://user@127.0.0.1:1/x?sslmode=require&password=secret"):
            pass
    assert "secret" not in str(raised.value)


async def test_a_database_that_went_away_is_one_error(database_url: str, tmp_path: Path) -> None:
    async with open_database(database_url) as database:
        log = ConversationLog(database)
        await log.check()
        async with database.writing() as connection:
            for table in ("shadow_answers", "feedback", "turns", "conversations"):
                await connection.execute(text(f"DROP TABLE {table}"))
        with pytest.raises(LogUnavailableError):
            await log.find(Caller("api"), "x", [])
        assert isinstance(database, Database)
