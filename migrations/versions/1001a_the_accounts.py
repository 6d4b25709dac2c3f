"""The tables of users, accounts and operations.

Revision ID: 1001a
Revises: 1001
"""

import sqlalchemy as sa
from alembic import op

from background import UtcDateTime

revision = "1001a"
down_revision = "1001"
branch_labels = None
depends_on = None

is_active = sa.text("status = 'active'")
is_passive = sa.text("status = 'passive'")


def ordered_text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.VARCHAR(length, collation="C"), "postgresql")


def upgrade() -> None:
    create_users()
    create_operations()


def create_users() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("email", ordered_text(254), nullable=False),
        sa.Column("name", ordered_text(120), nullable=False),
        sa.Column("password_hash", sa.String(255), nullable=False),
        sa.Column("status", sa.String(10), server_default="active", nullable=False),
        sa.Column("is_admin", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("last_login_at", UtcDateTime()),
        sa.CheckConstraint("status IN ('active', 'passive')", name=op.f("ck_users_status")),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("email", name="uq_users_email"),
    )
    op.create_index(
        "ix_users_last_seen_at_of_active",
        "users",
        [sa.text("coalesce(last_login_at, created_at)")],
        postgresql_where=is_active,
        sqlite_where=is_active,
    )
    op.create_index("ix_users_id_of_passive", "users", ["id"], postgresql_where=is_passive, sqlite_where=is_passive)
    op.create_index("ix_users_lower_name", "users", [sa.text("lower(name)"), "id"])


def create_operations() -> None:
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
    for table in ("rate_limits", "audit_entries", "health_samples", "users"):
        op.drop_table(table)
