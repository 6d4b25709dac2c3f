"""What operating it needs: log lines, releases, totals, the audit and the rate limits.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

from background.database.clock import UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def ordered_text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.VARCHAR(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("background_executions", sa.Column("log", sa.Text()))
    op.add_column("background_instances", sa.Column("release", sa.String(100)))
    op.create_table(
        "background_totals",
        sa.Column("worker", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(10), nullable=False),
        sa.Column("label", sa.String(12), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("latest_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("worker", "kind", "label", name="pk_background_totals"),
    )
    op.create_table(
        "audit_entries",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("action", sa.String(100), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("address", sa.String(45), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_audit_entries_user_id"),
        sa.PrimaryKeyConstraint("id", name="pk_audit_entries"),
    )
    op.create_table(
        "rate_limits",
        sa.Column("key", ordered_text(200), nullable=False),
        sa.Column("hits", sa.Integer(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_rate_limits"),
    )
    op.create_index("ix_rate_limits_expires_at", "rate_limits", ["expires_at"])


def downgrade() -> None:
    op.drop_table("rate_limits")
    op.drop_table("audit_entries")
    op.drop_table("background_totals")
    op.drop_column("background_instances", "release")
    op.drop_column("background_executions", "log")
