"""The mark that a worker had while the database's clock was ahead.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

from background.database.clock import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("background_workers", sa.Column("mark_ahead", UtcDateTime()))


def downgrade() -> None:
    op.drop_column("background_workers", "mark_ahead")
