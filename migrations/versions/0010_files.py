"""Where a file's URL stands in the output, and what is odd about a file; replays that fetch whole files anew.

Columns that may be empty or have a default are added and nothing else, so the release before runs on it.

Rows of the new kind `file` are of no use to it: its worker claims them, fails with a KeyError that it records
as a try, and puts them back, for three days, after which they are `gone`. A worker of the new release goes on
with them at their next try, and `receiver replay --media` fetches them even afterwards.

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
