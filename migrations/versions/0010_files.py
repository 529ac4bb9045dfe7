"""The place of a file's URL in the output, and warnings of a file; replays that fetch whole files anew.

Only nullable columns and columns with a default are added, so the release before runs on it.

It cannot download the new kind `file`: if its worker claims a row of it, it records an attempt that failed
with KeyError and puts the row back. If that goes on for three days, the file is `gone`. A worker of the new
release goes on with the row at its next attempt, and `receiver replay --media` fetches it even afterwards.

Revision: 0010
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    op.add_column("media", sa.Column("field", sa.Text()))
    op.add_column("media", sa.Column("warning", sa.Text()))
    op.add_column("media", sa.Column("seen_sha256", sa.String(64)))
    op.add_column("replays", sa.Column("force", sa.Boolean(), server_default=sa.false(), nullable=False))


def downgrade() -> None:
    op.drop_column("replays", "force")
    for name in ("seen_sha256", "warning", "field"):
        op.drop_column("media", name)
