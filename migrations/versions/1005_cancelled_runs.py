"""The engine's columns for cancelled and continued runs, retries and paused topics.

Revision ID: 1005
Revises: 1004
"""

from alembic import op

import background

revision = "1005"
down_revision = "1004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    background.migrate_to(op, version=2)


def downgrade() -> None:
    background.migrate_to(op, version=1)
