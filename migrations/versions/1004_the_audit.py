"""Commands and outcomes in the audit.

Revision ID: 1004
Revises: 1003
"""

import sqlalchemy as sa
from alembic import op

from background import UtcDateTime

revision = "1004"
down_revision = "1003"
branch_labels = None
depends_on = None


def audit_entries(*columns: sa.Column, needs_user: bool) -> sa.Table:
    """Return the table that SQLite copies."""
    return sa.Table(
        "audit_entries",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=not needs_user),
        sa.Column("action", sa.String(100), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("address", sa.String(45), nullable=False),
        *columns,
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_audit_entries_user_id"),
        sa.PrimaryKeyConstraint("id", name="pk_audit_entries"),
    )


def new_columns() -> list[sa.Column]:
    return [sa.Column("operator", sa.String(100)), sa.Column("outcome", sa.String(200))]


def upgrade() -> None:
    with op.batch_alter_table("audit_entries", copy_from=audit_entries(needs_user=True)) as table:
        table.alter_column("user_id", existing_type=sa.Integer(), nullable=True)
        for column in new_columns():
            table.add_column(column)
    op.create_index("ix_audit_entries_at", "audit_entries", ["at"])


def downgrade() -> None:
    """Delete the entries of commands, which no user made."""
    op.execute("DELETE FROM audit_entries WHERE user_id IS NULL")
    op.drop_index("ix_audit_entries_at", "audit_entries")
    with op.batch_alter_table("audit_entries", copy_from=audit_entries(*new_columns(), needs_user=False)) as table:
        table.alter_column("user_id", existing_type=sa.Integer(), nullable=False)
        for column in new_columns():
            table.drop_column(column.name)
