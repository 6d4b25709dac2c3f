"""The shop's tables and the engine's.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op

from background.database.clock import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

is_active = sa.text("status = 'active'")
is_passive = sa.text("status = 'passive'")


def ordered_text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.VARCHAR(length, collation="C"), "postgresql")


def upgrade() -> None:
    create_shop()
    create_engine()


def create_shop() -> None:
    op.create_table(
        "books",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("author", sa.String(200), nullable=False),
        sa.Column("isbn", sa.String(17)),
        sa.Column("description", sa.Text(), server_default="", nullable=False),
        sa.Column("price_cents", sa.Integer(), nullable=False),
        sa.Column("stock", sa.Integer(), server_default="0", nullable=False),
        sa.CheckConstraint("price_cents >= 0", name=op.f("ck_books_price_cents")),
        sa.CheckConstraint("stock >= 0", name=op.f("ck_books_stock")),
        sa.PrimaryKeyConstraint("id", name="pk_books"),
        sa.UniqueConstraint("isbn", name="uq_books_isbn"),
    )
    op.create_index("ix_books_title", "books", ["title"])
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
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("book_id", sa.Integer(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("price_cents", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(10), server_default="placed", nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("price_cents >= 0", name=op.f("ck_orders_price_cents")),
        sa.CheckConstraint("quantity > 0", name=op.f("ck_orders_quantity")),
        sa.ForeignKeyConstraint(["book_id"], ["books.id"], name="fk_orders_book_id"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_orders_user_id"),
        sa.PrimaryKeyConstraint("id", name="pk_orders"),
    )
    op.create_index("ix_orders_book_id", "orders", ["book_id"])
    op.create_index("ix_orders_user_id", "orders", ["user_id"])


def create_engine() -> None:
    op.create_table(
        "background_workers",
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("mark", UtcDateTime()),
        sa.Column("previous_mark", UtcDateTime()),
        sa.Column("token", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("running", sa.BigInteger()),
        sa.Column("pending_tick", UtcDateTime()),
        sa.Column("pending_attempt", sa.Integer()),
        sa.Column("pending_trigger", sa.String(10)),
        sa.Column("schedule", sa.String(200), nullable=False),
        sa.Column("declared", sa.String(200), nullable=False),
        sa.Column("scheduled_at", UtcDateTime(), nullable=False),
        sa.Column("paused_at", UtcDateTime()),
        sa.PrimaryKeyConstraint("name", name="pk_background_workers"),
    )
    op.create_table(
        "background_executions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("worker", sa.String(200), nullable=False),
        sa.Column("tick", UtcDateTime(), nullable=False),
        sa.Column("through", UtcDateTime()),
        sa.Column("trigger", sa.String(10), nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("attempt", sa.Integer()),
        sa.Column("token", sa.BigInteger()),
        sa.Column("instance", sa.String(32)),
        sa.Column("instance_name", sa.String(255)),
        sa.Column("started_at", UtcDateTime()),
        sa.Column("finished_at", UtcDateTime()),
        sa.Column("progress_done", sa.Float()),
        sa.Column("progress_total", sa.Float()),
        sa.Column("reason", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_background_executions"),
    )
    op.create_index("ix_background_executions_worker_tick", "background_executions", ["worker", "tick"])
    op.create_index("ix_background_executions_token", "background_executions", ["worker", "token"], unique=True)
    op.create_table(
        "background_instances",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("heartbeat_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("signed_off_at", UtcDateTime()),
        sa.Column("clock_offset", sa.Float()),
        sa.PrimaryKeyConstraint("id", name="pk_background_instances"),
    )


def downgrade() -> None:
    for table in (
        "background_workers",
        "background_executions",
        "background_instances",
        "orders",
        "users",
        "books",
    ):
        op.drop_table(table)
