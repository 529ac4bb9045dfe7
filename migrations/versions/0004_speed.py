"""Keep the cost constant as history grows: an index by time of receipt; request_id with one index less.

Revision: 0004
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
release_before_runs = True


def upgrade() -> None:
    # Create the new index first, so that there is always one.
    with op.batch_alter_table("events") as events:
        events.create_unique_constraint("uq_events_request_id_source", ["request_id", "source"])
        events.drop_constraint("uq_events_source_request_id", type_="unique")
        events.drop_index("ix_events_request_id")
        events.create_index("ix_events_received_at_seq", ["received_at", "seq"])
    if op.get_bind().dialect.name == "postgresql":
        for table in ("events", "deliveries"):
            # A poll steps over the dead index entries since the last vacuum. By default those may be a fifth
            # of the history, and if only a small part of a large table is dead, vacuum skips its indexes.
            op.execute(
                f"ALTER TABLE {table} SET (autovacuum_vacuum_scale_factor = 0.02, vacuum_index_cleanup = on)"
            )


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for table in ("events", "deliveries"):
            op.execute(f"ALTER TABLE {table} RESET (autovacuum_vacuum_scale_factor, vacuum_index_cleanup)")
    with op.batch_alter_table("events") as events:
        events.drop_index("ix_events_received_at_seq")
        events.create_index("ix_events_request_id", ["request_id"])
        events.create_unique_constraint("uq_events_source_request_id", ["source", "request_id"])
        events.drop_constraint("uq_events_request_id_source", type_="unique")
