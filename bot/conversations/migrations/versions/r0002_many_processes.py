"""Fences, numbered turns, message ids, people, full-text search, idempotency keys, API keys and the audit.

A turn's primary key changes, which SQLite cannot do in place: all tables are copied.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_RowNumber = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_Time = sa.DateTime(timezone=True)
_COPIED = ("conversations", "turns", "feedback", "shadow_answers")

_TURNS_BEFORE = (
    "id, conversation_id, position, created_at, system, question, answer, author, domain, version, digest, fingerprint, "
    "routing_reason, routing_score, routing_scores, num_prompt_tokens, token_ids, finish_reason, first_token_ms, total_ms"
)


def upgrade() -> None:
    for table in _COPIED:
        op.execute(f"CREATE TABLE old_{table} AS SELECT * FROM {table}")
    for table in reversed(_COPIED):
        op.drop_table(table)
    _create_conversations()
    _create_turns()
    _create_what_joins_turns()
    _create_idempotent_requests()
    _create_access()
    _copy()
    _create_text_search()
    for table in _COPIED:
        op.drop_table(f"old_{table}")


def _create_conversations() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(640), nullable=False, unique=True),
        sa.Column("scope", sa.String(512), nullable=False),
        sa.Column("person", sa.String(256)),
        sa.Column("channel", sa.String(16), nullable=False),
        sa.Column("domain", sa.String(48)),
        sa.Column("is_domain_fixed", sa.Boolean, nullable=False),
        sa.Column("transcript", sa.String(64)),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", _Time, nullable=False),
        sa.Column("updated_at", _Time, nullable=False),
    )
    op.create_index("ix_conversations_transcript", "conversations", ["transcript"])
    op.create_index("ix_conversations_created", "conversations", ["created_at", "id"])
    op.create_index("ix_conversations_scope_created", "conversations", ["scope", "created_at", "id"])
    op.create_index("ix_conversations_person_created", "conversations", ["person", "created_at", "id"])


def _create_turns() -> None:
    op.create_table(
        "turns",
        sa.Column("number", _RowNumber, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("message_id", sa.String(64), unique=True),
        sa.Column("created_at", _Time, nullable=False),
        sa.Column("system", sa.Text),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("alternatives", sa.JSON, nullable=False),
        sa.Column("author", sa.String(8), nullable=False),
        sa.Column("domain", sa.String(48)),
        sa.Column("version", sa.Integer),
        sa.Column("digest", sa.String(64)),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("routing_reason", sa.String(32), nullable=False),
        sa.Column("routing_score", sa.Float),
        sa.Column("routing_scores", sa.JSON, nullable=False),
        sa.Column("num_prompt_tokens", sa.Integer, nullable=False),
        sa.Column("token_ids", sa.JSON, nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("error", sa.String(64)),
        sa.Column("queue_ms", sa.Float),
        sa.Column("first_token_ms", sa.Float),
        sa.Column("total_ms", sa.Float, nullable=False),
        sa.Column("vote", sa.String(8)),
        sa.UniqueConstraint("conversation_id", "position"),
        sqlite_autoincrement=True,
    )
    is_voted = sa.text("vote IS NOT NULL")
    op.create_index("ix_turns_domain", "turns", ["domain", "number"])
    op.create_index("ix_turns_domain_version", "turns", ["domain", "version", "number"])
    op.create_index("ix_turns_created", "turns", ["created_at", "number"])
    op.create_index("ix_turns_vote", "turns", ["vote", "number"], sqlite_where=is_voted, postgresql_where=is_voted)
    op.create_index("ix_turns_finish_reason", "turns", ["finish_reason", "number"])


def _create_what_joins_turns() -> None:
    op.create_table(
        "feedback",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("turn_id", sa.String(64), sa.ForeignKey("turns.id"), nullable=False),
        sa.Column("created_at", _Time, nullable=False),
        sa.Column("author", sa.String(64)),
        sa.Column("vote", sa.String(8), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("correction", sa.Text),
    )
    op.create_index("ix_feedback_turn", "feedback", ["turn_id", "id"])
    op.create_table(
        "shadow_answers",
        sa.Column("turn_id", sa.String(64), sa.ForeignKey("turns.id"), primary_key=True),
        sa.Column("created_at", _Time, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64)),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("token_ids", sa.JSON, nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("total_ms", sa.Float, nullable=False),
    )


def _create_idempotent_requests() -> None:
    op.create_table(
        "idempotent_requests",
        sa.Column("scope", sa.String(512), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("attempt", sa.String(64), nullable=False),
        sa.Column("response", sa.JSON),
        sa.Column("created_at", _Time, nullable=False),
    )
    op.create_index("ix_idempotent_requests_created", "idempotent_requests", ["created_at"])


def _create_access() -> None:
    is_live = sa.text("revoked_at IS NULL")
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("domains", sa.JSON),
        sa.Column("rate_per_minute", sa.Integer),
        sa.Column("max_concurrent", sa.Integer),
        sa.Column("created_at", _Time, nullable=False),
        sa.Column("created_by", sa.String(64), nullable=False),
        sa.Column("expires_at", _Time),
        sa.Column("revoked_at", _Time),
    )
    op.create_index("ux_api_keys_live_name", "api_keys", ["name"], unique=True, sqlite_where=is_live, postgresql_where=is_live)
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", _Time, nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("object", sa.String(128), nullable=False),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_index("ix_audit_at", "audit", ["at"])


def _copy() -> None:
    op.execute(
        "INSERT INTO conversations (id, key, scope, channel, domain, is_domain_fixed, transcript, fence, metadata, "
        "created_at, updated_at) SELECT id, 'api/0:/' || substr(key, 5), 'api', 'api', domain, false, transcript, 0, '{}', "
        "created_at, created_at FROM old_conversations"
    )
    op.execute(
        f"INSERT INTO turns ({_TURNS_BEFORE}, alternatives) SELECT {_TURNS_BEFORE}, '[]' FROM old_turns "
        "ORDER BY created_at, conversation_id, position"
    )
    op.execute(
        "INSERT INTO feedback (id, turn_id, created_at, vote, reason, correction) "
        "SELECT id, turn_id, created_at, vote, reason, correction FROM old_feedback"
    )
    op.execute(
        "UPDATE turns SET vote = (SELECT vote FROM feedback WHERE turn_id = turns.id ORDER BY feedback.id DESC LIMIT 1) "
        "WHERE id IN (SELECT turn_id FROM feedback)"
    )
    op.execute("INSERT INTO shadow_answers SELECT * FROM old_shadow_answers")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("SELECT setval(pg_get_serial_sequence('feedback', 'id'), max(id)) FROM feedback HAVING max(id) IS NOT NULL")


def _create_text_search() -> None:
    """SQLite keeps an index of its own beside the table, which triggers keep up; PostgreSQL has an ordinary one."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE INDEX ix_turns_text ON turns USING gin (to_tsvector('simple', question || ' ' || answer))")
        return
    op.execute(
        "CREATE VIRTUAL TABLE turns_text USING fts5(question, answer, content='turns', content_rowid='number', "
        "tokenize='unicode61 remove_diacritics 0')"
    )
    op.execute(
        "CREATE TRIGGER turns_text_insert AFTER INSERT ON turns BEGIN "
        "INSERT INTO turns_text(rowid, question, answer) VALUES (new.number, new.question, new.answer); END"
    )
    removed = (
        "INSERT INTO turns_text(turns_text, rowid, question, answer) VALUES ('delete', old.number, old.question, old.answer)"
    )
    op.execute(f"CREATE TRIGGER turns_text_delete AFTER DELETE ON turns BEGIN {removed}; END")
    op.execute(
        f"CREATE TRIGGER turns_text_update AFTER UPDATE OF question, answer ON turns BEGIN {removed}; "
        "INSERT INTO turns_text(rowid, question, answer) VALUES (new.number, new.question, new.answer); END"
    )
    op.execute("INSERT INTO turns_text(turns_text) VALUES ('rebuild')")
