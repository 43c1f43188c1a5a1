"""The tables as they were before there were migrations: a log without a recorded revision has these."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(255), nullable=False, unique=True),
        sa.Column("domain", sa.String(48)),
        sa.Column("transcript", sa.String(64)),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_conversations_transcript", "conversations", ["transcript"])
    op.create_table(
        "turns",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id"), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("system", sa.Text),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
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
        sa.Column("first_token_ms", sa.Float),
        sa.Column("total_ms", sa.Float, nullable=False),
        sa.UniqueConstraint("conversation_id", "position"),
    )
    op.create_index("ix_turns_domain_created", "turns", ["domain", "created_at"])
    op.create_table(
        "feedback",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("turn_id", sa.String(64), sa.ForeignKey("turns.id"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("vote", sa.String(8), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("correction", sa.Text),
    )
    op.create_index("ix_feedback_turn", "feedback", ["turn_id"])
    op.create_table(
        "shadow_answers",
        sa.Column("turn_id", sa.String(64), sa.ForeignKey("turns.id"), primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64)),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("token_ids", sa.JSON, nullable=False),
        sa.Column("finish_reason", sa.String(16), nullable=False),
        sa.Column("total_ms", sa.Float, nullable=False),
    )
