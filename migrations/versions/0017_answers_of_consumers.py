"""The start of a consumer's answer, with the attempt that it answered.

Only a nullable column is added, so the release before runs on it.

Revision: 0017
"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    op.add_column("attempts", sa.Column("answer", sa.Text()))


def downgrade() -> None:
    with op.batch_alter_table("attempts") as batch:
        batch.drop_column("answer")
