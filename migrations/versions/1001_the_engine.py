"""The engine's tables.

Revision ID: 1001
Revises:
"""

from alembic import op

import background

revision = "1001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    background.migrate_to(op, version=1)


def downgrade() -> None:
    background.migrate_to(op, version=0)
