"""Messages, locks, and what the health worker writes down.

Revision ID: 0003
Revises: 0002
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from background.database.clock import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "background_messages",
        sa.Column("id", Id, nullable=False),
        sa.Column("topic", sa.String(100), nullable=False),
        sa.Column("key", sa.String(200)),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("state", sa.String(10), server_default="waiting", nullable=False),
        sa.Column("enqueued_at", UtcDateTime(), nullable=False),
        sa.Column("due_at", UtcDateTime(), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("token", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("batch", sa.String(32)),
        sa.Column("instance", sa.String(32)),
        sa.Column("instance_name", sa.String(255)),
        sa.Column("claimed_at", UtcDateTime()),
        sa.Column("finished_at", UtcDateTime()),
        sa.PrimaryKeyConstraint("id", name="pk_background_messages"),
    )
    table = "background_messages"
    op.create_index(
        "ix_background_messages_key", table, ["topic", "key"], unique=True, **where("key IS NOT NULL")
    )
    op.create_index("ix_background_messages_due", table, ["topic", "due_at", "id"], **where("state = 'waiting'"))
    op.create_index("ix_background_messages_running", table, ["instance"], **where("state = 'running'"))
    op.create_index("ix_background_messages_dead", table, ["topic", "id"], **where("state = 'dead'"))
    op.create_index("ix_background_messages_finished", table, ["finished_at"], **where("finished_at IS NOT NULL"))
    op.create_table(
        "background_message_errors",
        sa.Column("id", Id, nullable=False),
        sa.Column("message", Id, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("instance_name", sa.String(255)),
        sa.Column("error", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["message"],
            ["background_messages.id"],
            name="fk_background_message_errors_message",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_background_message_errors"),
    )
    op.create_index("ix_background_message_errors_message", "background_message_errors", ["message"])
    op.create_table(
        "background_locks",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.String(32)),
        sa.Column("instance", sa.String(32)),
        sa.Column("instance_name", sa.String(255)),
        sa.Column("since", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_background_locks"),
    )
    op.create_table(
        "health_samples",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("taken_at", UtcDateTime(), nullable=False),
        sa.Column("database_ms", sa.Float(), nullable=False),
        sa.Column("disk_free_bytes", sa.BigInteger(), nullable=False),
        sa.Column("messages_waiting", sa.Integer(), nullable=False),
        sa.Column("messages_dead", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_health_samples"),
    )
    op.create_index("ix_health_samples_taken_at", "health_samples", ["taken_at"])


def downgrade() -> None:
    for table in ("health_samples", "background_locks", "background_message_errors", "background_messages"):
        op.drop_table(table)
