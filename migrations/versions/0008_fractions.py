"""Prices with fractions: millionths of a credit beyond the whole ones.

Only columns with a default are added, so the release before runs on it: it writes whole prices.

Revision: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None
release_before_runs = True

COLUMNS = (
    ("events", "cost_micros"),
    ("jobs", "max_cost_micros"),
    ("jobs", "cost_micros"),
    ("jobs", "charged_micros"),
)


def upgrade() -> None:
    for table, name in COLUMNS:
        op.add_column(table, sa.Column(name, sa.Integer(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    for table, name in COLUMNS:
        op.drop_column(table, name)
