"""The usage of tokens is listed by project."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NAME = "ix_metering_token_project_id_seq"


def upgrade() -> None:
    has_project = sa.text("project_id IS NOT NULL")
    op.create_index(
        NAME,
        "metering_token",
        ["project_id", "seq"],
        unique=False,
        sqlite_where=has_project,
        postgresql_where=has_project,
    )


def downgrade() -> None:
    raise RuntimeError("a release is not taken back: restore a copy instead")
