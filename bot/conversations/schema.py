"""The tables of the conversation log."""

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

# `key` is a conversation's identity on its channel; `transcript` the digest of its messages so far (see log.transcript_digest).
conversations = Table(
    "conversations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("key", String(255), nullable=False, unique=True),
    Column("domain", String(48)),
    Column("transcript", String(64)),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Index("ix_conversations_transcript", "transcript"),
)

turns = Table(
    "turns",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("conversation_id", ForeignKey("conversations.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("system", Text),
    Column("question", Text, nullable=False),
    Column("answer", Text, nullable=False),
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
    Column("first_token_ms", Float),
    Column("total_ms", Float, nullable=False),
    Column("alternatives", JSON, nullable=False),
    UniqueConstraint("conversation_id", "position"),
    Index("ix_turns_domain_created", "domain", "created_at"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("turn_id", ForeignKey("turns.id"), nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("vote", String(8), nullable=False),
    Column("reason", Text),
    Column("correction", Text),
    Index("ix_feedback_turn", "turn_id"),
)

# What a shadow version would have answered. Never shown to anybody in a channel.
shadow_answers = Table(
    "shadow_answers",
    metadata,
    Column("turn_id", ForeignKey("turns.id"), primary_key=True),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(64)),
    Column("answer", Text, nullable=False),
    Column("token_ids", JSON, nullable=False),
    Column("finish_reason", String(16), nullable=False),
    Column("total_ms", Float, nullable=False),
)
