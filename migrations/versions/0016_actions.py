"""The table of operators' actions.

Only a table is added, so the release before runs on it.

Revision: 0016
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    op.create_table(
        "actions",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("operation", sa.String(length=63), nullable=False),
        sa.Column("target", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("dry_run", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("status", sa.SmallInteger()),
        sa.Column("code", sa.String(length=63)),
        sa.PrimaryKeyConstraint("id", name="pk_actions"),
    )


def downgrade() -> None:
    op.drop_table("actions")
