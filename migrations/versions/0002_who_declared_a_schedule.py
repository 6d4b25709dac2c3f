"""Which instance declared a worker's schedule.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("background_workers", sa.Column("declared_by", sa.String(32)))


def downgrade() -> None:
    op.drop_column("background_workers", "declared_by")
