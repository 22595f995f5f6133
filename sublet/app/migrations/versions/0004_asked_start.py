"""A sale whose start was moved knows which start was asked for."""

import sqlalchemy as sa
from alembic import op

from sublet.base.store import types

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("allocation_claim", sa.Column("asked_at", types.Instant(), nullable=True))


def downgrade() -> None:
    raise RuntimeError("a release is not taken back: restore a copy instead")
