"""The random id of each claim, a copy of the newest claim, and an index of what runs.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

from background.database.clock import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

COPY = {
    "claim": sa.String(32),
    "claim_tick": UtcDateTime(),
    "claim_attempt": sa.Integer(),
    "claim_trigger": sa.String(10),
    "claim_instance": sa.String(32),
    "claim_instance_name": sa.String(255),
    "claim_at": UtcDateTime(),
}


def upgrade() -> None:
    for name, kind in COPY.items():
        op.add_column("background_workers", sa.Column(name, kind))
    op.add_column("background_executions", sa.Column("claim", sa.String(32)))
    op.create_index(
        "ix_background_executions_running",
        "background_executions",
        ["worker"],
        postgresql_where=sa.text("state = 'running'"),
        sqlite_where=sa.text("state = 'running'"),
    )


def downgrade() -> None:
    op.drop_index("ix_background_executions_running", "background_executions")
    op.drop_column("background_executions", "claim")
    for name in reversed(COPY):
        op.drop_column("background_workers", name)
