"""One random key of events instead of two: `id` is made of the source and the request_id.

Revision: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
release_before_runs = False  # it notes no sources


def upgrade() -> None:
    op.create_table(
        "sources",
        sa.Column("name", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_sources"),
    )
    op.execute("INSERT INTO sources (name) SELECT DISTINCT source FROM events")
    with op.batch_alter_table("events") as events:
        events.drop_constraint("uq_events_request_id_source", type_="unique")


def downgrade() -> None:
    with op.batch_alter_table("events") as events:
        events.create_unique_constraint("uq_events_request_id_source", ["request_id", "source"])
    op.drop_table("sources")
