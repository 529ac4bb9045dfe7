"""The tables of paused destinations and of open circuits.

Only tables are added, so the release before runs on them. It does not read them: it delivers to a destination
that is paused.

Revision: 0015
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    op.create_table(
        "destinations",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("paused_at", sa.DateTime(timezone=True)),
        sa.Column("paused_by", sa.Text()),
        sa.Column("pause_reason", sa.Text()),
        sa.Column("resumed_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("name", name="pk_destinations"),
    )
    op.create_table(
        "circuits",
        sa.Column("destination", sa.String(length=63), nullable=False),
        sa.Column("process", sa.Uuid(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("open_since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("reported_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("destination", "process", name="pk_circuits"),
    )


def downgrade() -> None:
    op.drop_table("circuits")
    op.drop_table("destinations")
