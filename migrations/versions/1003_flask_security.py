"""The accounts of Flask-Security.

The old password hashes are discarded. Each user must ask for a password reset link.

Revision ID: 1003
Revises: 1002
"""

from contextlib import suppress

import sqlalchemy as sa
from alembic import op
from email_validator import EmailNotValidError, validate_email

from background import UtcDateTime

revision = "1003"
down_revision = "1002"
branch_labels = None
depends_on = None


def ordered_text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.VARCHAR(length, collation="C"), "postgresql")


def new_columns() -> list[sa.Column]:
    return [
        sa.Column("active", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("fs_uniquifier", sa.String(64)),
        sa.Column("confirmed_at", UtcDateTime()),
        sa.Column("tf_primary_method", sa.String(64)),
        sa.Column("tf_totp_secret", sa.String(255)),
        sa.Column("tf_last_counter", sa.Integer()),
    ]


def users(*constraints: sa.UniqueConstraint) -> sa.Table:
    """Return the table that SQLite copies. It has the columns of both revisions."""
    return sa.Table(
        "users",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("email", ordered_text(254), nullable=False),
        sa.Column("name", ordered_text(120), nullable=False),
        sa.Column("password_hash", sa.String(255)),
        sa.Column("status", sa.String(10), server_default="active", nullable=False),
        sa.Column("is_admin", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("last_login_at", UtcDateTime()),
        *new_columns(),
        sa.CheckConstraint("status IN ('active', 'passive')", name=op.f("ck_users_status")),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("email", name="uq_users_email"),
        *constraints,
    )


def upgrade() -> None:
    for column in new_columns():
        op.add_column("users", column)
    # Without a password, each user needs a reset link from the mailbox. So the e-mail counts as confirmed.
    op.execute(f"UPDATE users SET fs_uniquifier = {random_text()}, confirmed_at = created_at")
    if not op.get_context().as_sql:
        normalize_emails()
    drop_indexes()
    with op.batch_alter_table("users", copy_from=users()) as table:
        # An earlier release may still add users, which get the default.
        default = sa.text(random_text())
        table.alter_column("fs_uniquifier", existing_type=sa.String(64), nullable=False, server_default=default)
        table.create_unique_constraint("uq_users_fs_uniquifier", ["fs_uniquifier"])
        table.alter_column("password_hash", existing_type=sa.String(255), nullable=True)
    op.execute("UPDATE users SET password_hash = NULL")
    create_indexes()


def random_text() -> str:
    """Return SQL for a random text, different in each row."""
    if is_sqlite():
        return "(lower(hex(randomblob(16))))"
    return "replace(gen_random_uuid()::text, '-', '')"


def is_sqlite() -> bool:
    return op.get_context().dialect.name == "sqlite"


def normalize_emails() -> None:
    """Normalize each e-mail, as the forms do. An e-mail that would equal another account's stays unchanged."""
    connection = op.get_bind()
    is_ascii = "email NOT GLOB '*[^ -~]*'" if is_sqlite() else "email !~ '[^ -~]'"
    taken = "SELECT 1 FROM users WHERE email = :email"
    for user_id, email in connection.execute(sa.text(f"SELECT id, email FROM users WHERE NOT ({is_ascii})")).all():
        with suppress(EmailNotValidError):
            valid = validate_email(email, check_deliverability=False)
            given = {"email": f"{valid.local_part}@{valid.ascii_domain}".lower(), "id": user_id}
            connection.execute(sa.text(f"UPDATE users SET email = :email WHERE id = :id AND NOT EXISTS ({taken})"), given)


def drop_indexes() -> None:
    """Drop the indexes. A generated migration may have lost the indexes on expressions."""
    for name in ("ix_users_last_seen_at_of_active", "ix_users_id_of_passive", "ix_users_lower_name"):
        op.drop_index(name, "users", if_exists=True)


def create_indexes() -> None:
    """Create the indexes on expressions, which a copy of the table loses."""
    active, passive = sa.text("status = 'active'"), sa.text("status = 'passive'")
    op.create_index(
        "ix_users_last_seen_at_of_active",
        "users",
        [sa.text("coalesce(last_login_at, created_at)")],
        postgresql_where=active,
        sqlite_where=active,
    )
    op.create_index("ix_users_id_of_passive", "users", ["id"], postgresql_where=passive, sqlite_where=passive)
    op.create_index("ix_users_lower_name", "users", [sa.text("lower(name)"), "id"])


def downgrade() -> None:
    """Discard the hashes of Flask-Security, which the earlier release cannot read. All users need a new password."""
    op.execute("UPDATE users SET password_hash = '!'")
    drop_indexes()
    unique = sa.UniqueConstraint("fs_uniquifier", name="uq_users_fs_uniquifier")
    with op.batch_alter_table("users", copy_from=users(unique)) as table:
        table.alter_column("password_hash", existing_type=sa.String(255), nullable=False)
        table.drop_constraint("uq_users_fs_uniquifier", type_="unique")
        for column in new_columns():
            table.drop_column(column.name)
    create_indexes()
