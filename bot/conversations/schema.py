"""The tables of the conversation log, of API keys and of the audit.

A change needs a migration beside it (`migrations/versions`); a test compares them.
"""

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)

metadata = MetaData()
_IS_VOTED = text("vote IS NOT NULL")
_IS_LIVE = text("revoked_at IS NULL")

# SQLite counts rows up by itself for INTEGER alone.
RowNumber = BigInteger().with_variant(Integer(), "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """SQLite keeps no time zone: what is written is UTC, and what is read says so."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)) if value else None


# `key` is a conversation's identity on its channel; `scope` and `person` say whose it is; `transcript` is the digest of its
# messages so far (see log.transcript_digest), for callers that name none; `fence` counts claims: who holds an older number
# has lost the conversation to another worker and writes nothing.
conversations = Table(
    "conversations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key", String(640), nullable=False, unique=True),
    Column("scope", String(512), nullable=False),
    Column("person", String(256)),
    Column("channel", String(16), nullable=False),
    Column("domain", String(48)),
    Column("is_domain_fixed", Boolean, nullable=False),
    Column("transcript", String(64)),
    Column("fence", BigInteger, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Index("ix_conversations_transcript", "transcript"),
    Index("ix_conversations_created", "created_at", "id"),
    Index("ix_conversations_scope_created", "scope", "created_at", "id"),
    Index("ix_conversations_person_created", "person", "created_at", "id"),
)

# `number` orders turns as they were logged: the cursor of every listing. `message_id` is the inbox entry that was answered:
# unique, so that a message that is delivered twice is answered once. `vote` is the latest feedback's: a filter by it must find
# its page in an index. Indexes end in what their listing is ordered by, so that a page is read off them without sorting.
turns = Table(
    "turns",
    metadata,
    Column("number", RowNumber, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("conversation_id", ForeignKey("conversations.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("message_id", String(64), unique=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("system", Text),
    Column("question", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("alternatives", JSON, nullable=False),
    Column("author", String(8), nullable=False),
    Column("domain", String(48)),
    Column("version", Integer),
    Column("digest", String(64)),
    Column("fingerprint", String(64), nullable=False),
    Column("routing_reason", String(32), nullable=False),
    Column("routing_score", Float),
    Column("routing_scores", JSON, nullable=False),
    Column("num_prompt_tokens", Integer, nullable=False),
    Column("token_ids", JSON, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("error", String(64)),
    Column("queue_ms", Float),
    Column("first_token_ms", Float),
    Column("total_ms", Float, nullable=False),
    Column("vote", String(8)),
    UniqueConstraint("conversation_id", "position"),
    Index("ix_turns_domain", "domain", "number"),
    Index("ix_turns_domain_version", "domain", "version", "number"),
    Index("ix_turns_created", "created_at", "number"),
    Index("ix_turns_vote", "vote", "number", sqlite_where=_IS_VOTED, postgresql_where=_IS_VOTED),
    Index("ix_turns_finish_reason", "finish_reason", "number"),
    sqlite_autoincrement=True,  # the number of a deleted turn is not given again
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("turn_id", ForeignKey("turns.id"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("author", String(64)),
    Column("vote", String(8), nullable=False),
    Column("reason", Text),
    Column("correction", Text),
    Index("ix_feedback_turn", "turn_id", "id"),
)

# What a shadow version would have answered. Never shown to anybody in a channel.
shadow_answers = Table(
    "shadow_answers",
    metadata,
    Column("turn_id", ForeignKey("turns.id"), primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(64)),
    Column("answer", Text, nullable=False),
    Column("token_ids", JSON, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("total_ms", Float, nullable=False),
)

# Requests that carried an idempotency key, and what was answered; `response` is null while the first one is under way.
idempotent_requests = Table(
    "idempotent_requests",
    metadata,
    Column("scope", String(512), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_digest", String(64), nullable=False),
    Column("attempt", String(64), nullable=False),
    Column("response", JSON),
    Column("created_at", UtcDateTime, nullable=False),
    Index("ix_idempotent_requests_created", "created_at"),
)
# `hash` is the SHA-256 of the secret, which is shown once and kept nowhere. Null domains are all, null limits the settings'.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("domains", JSON(none_as_null=True)),
    Column("rate_per_minute", Integer),
    Column("max_concurrent", Integer),
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_by", String(64), nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Index("ux_api_keys_live_name", "name", unique=True, sqlite_where=_IS_LIVE, postgresql_where=_IS_LIVE),
)

# Who did what to what. Rows are only ever added.
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("object", String(128), nullable=False),
    Column("detail", JSON, nullable=False),
    Index("ix_audit_at", "at"),
)
