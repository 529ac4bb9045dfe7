"""The first receipt is part of the event's row, and digests are bytes.

On PostgreSQL `STEPS` do the work in short transactions while processes of the release before go on: their
triggers keep new rows right, so that `upgrade` only has to swap columns. If the steps are interrupted, they
go on after the last committed page. Until then the release before does not show the first receipts that were
moved, and its export lacks them.

A first receipt is moved only if the event's row can tell all of it.

Revision: 0013
"""

from typing import Any

import sqlalchemy as sa
import structlog
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None
release_before_runs = False  # it looks for first receipts in their table, and writes digests as text

PAGE = 2000
"""Events of one transaction: it takes about a fifth of a second."""

COLUMNS = {
    "webhook_id": sa.String(255),
    "secret_id": sa.String(16),
    "signed_at": sa.DateTime(timezone=True),
    "first_outcome": sa.String(16),
}
FOLLOWS = "CASE WHEN events.status IS NULL THEN 'unrecognized' ELSE 'accepted' END"
"""The outcome that follows from an event, if `first_outcome` is null."""


def first_outcome(outcome: str) -> str:
    """Return the value of `first_outcome`.

    `unrecognized` is never left to follow from the status: the release before may still set that.
    """
    return f"CASE WHEN {outcome} = 'accepted' AND events.status IS NOT NULL THEN NULL ELSE {outcome} END"


def is_first(receipts: str) -> str:
    """Return the condition that the first receipt of an event can be part of the event's row."""
    return f"""
        {receipts}.outcome IN ('accepted', 'unrecognized') AND {receipts}.body IS NULL
        AND {receipts}.repeated = 0 AND events.origin = 'webhook'
        AND {receipts}.received_at = events.received_at AND {receipts}.body_sha256 = events.body_sha256
    """


def digest(table: str) -> str:
    """Return a digest as bytes; an import of a release before took any text for one."""
    text = f"{table}.body_sha256"
    return f"decode(CASE WHEN {text} ~ '^([0-9a-fA-F][0-9a-fA-F])*$' THEN {text} ELSE '' END, 'hex')"


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        upgrade_sqlite(connection)
        return
    connection.execute(sa.text("LOCK TABLE events, receipts IN ACCESS EXCLUSIVE MODE"))
    for step in STEPS:
        while step(connection) is not None:
            pass
    for statement in SWAP:
        connection.execute(sa.text(statement))


def from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def upgrade_sqlite(connection: sa.Connection) -> None:
    last = connection.execute(sa.text("SELECT max(seq) FROM events")).scalar_one()
    if last is not None and last > 100_000:
        structlog.get_logger().info("migrating; it takes about a minute for a million events", events=last)
    driver: Any = connection.connection
    driver.create_function("from_hex", 1, from_hex)
    for name, kind in COLUMNS.items():
        op.add_column("events", sa.Column(name, kind))
    for table in ("events", "receipts"):
        op.add_column(table, sa.Column("digest", sa.LargeBinary()))
    op.execute(f"""
        UPDATE events SET digest = from_hex(body_sha256), ({", ".join(COLUMNS)}) = (
            SELECT webhook_id, secret_id, signed_at, {first_outcome("outcome")} FROM receipts
            WHERE receipts.seq = (SELECT min(seq) FROM receipts WHERE event_seq = events.seq)
                AND {is_first("receipts")}
        )
    """)
    op.execute("""
        DELETE FROM receipts WHERE seq IN (
            SELECT min(receipts.seq) FROM receipts JOIN events ON events.seq = event_seq
            WHERE events.secret_id IS NOT NULL GROUP BY event_seq
        )
    """)
    op.execute("UPDATE receipts SET digest = from_hex(body_sha256)")
    for name in ("events", "receipts"):
        with op.batch_alter_table(name) as table:
            table.drop_column("body_sha256")
            table.alter_column(
                "digest", new_column_name="body_sha256", existing_type=sa.LargeBinary(), nullable=False
            )


def prepare(connection: sa.Connection) -> str | None:
    """Add columns, and triggers that convert new rows of running processes, as `fold_page` does old ones.

    The locks wait for transactions under way. So all rows up to the highest `seq` are committed, and later
    ones go through the triggers.
    """
    if not connection.execute(sa.text("SELECT to_regclass('fold_progress')")).scalar_one():
        for statement in PREPARE:
            connection.execute(sa.text(statement))
    return None


def fold_page(connection: sa.Connection) -> str | None:
    """Convert the next events. If some are locked, the page is repeated."""
    after, until = connection.execute(sa.text("SELECT after, until FROM fold_progress")).one()
    page = f"SELECT seq FROM events WHERE seq > {after} AND seq <= {until} ORDER BY seq LIMIT {PAGE}"
    last = connection.execute(sa.text(f"SELECT max(seq) FROM ({page}) AS page")).scalar_one()
    if last is None:
        return None
    # The numbers are part of the text, because a plan for any numbers would read the tables whole.
    numbers = {"after": after, "last": last}
    connection.execute(sa.text(FOLD.format(**numbers)))
    if not connection.execute(sa.text(LEFT.format(**numbers))).scalar_one():
        connection.execute(sa.text(f"UPDATE fold_progress SET after = {last}"))
    return f"events up to {last:,} of {until:,}"


def check(connection: sa.Connection) -> str | None:
    """Add constraints, which need a scan, but not yet."""
    for table in ("events", "receipts"):
        known = (
            f"SELECT 1 FROM pg_constraint WHERE conname = 'digest_known' AND conrelid = '{table}'::regclass"
        )
        if connection.execute(sa.text(known)).first() is None:
            constraint = "digest_known CHECK (digest IS NOT NULL) NOT VALID"
            connection.execute(sa.text(f"ALTER TABLE {table} ADD CONSTRAINT {constraint}"))
    return None


def validate(connection: sa.Connection) -> str | None:
    """Scan the tables, which locks no row, so that NOT NULL needs no scan under its lock."""
    for table in ("events", "receipts"):
        connection.execute(sa.text(f"ALTER TABLE {table} VALIDATE CONSTRAINT digest_known"))
    return None


STEPS = (prepare, fold_page, check, validate)

PREPARE = (
    "LOCK TABLE events, receipts IN ACCESS EXCLUSIVE MODE",
    """
    ALTER TABLE events ADD COLUMN webhook_id VARCHAR(255), ADD COLUMN secret_id VARCHAR(16),
        ADD COLUMN signed_at TIMESTAMPTZ, ADD COLUMN first_outcome VARCHAR(16), ADD COLUMN digest BYTEA
    """,
    "ALTER TABLE receipts ADD COLUMN digest BYTEA",
    f"""
    CREATE FUNCTION fold_event() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.digest = {digest("NEW")};
        RETURN NEW;
    END $$
    """,
    f"""
    CREATE FUNCTION fold_receipt() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.digest = {digest("NEW")};
        IF TG_OP = 'INSERT' THEN
            UPDATE events SET webhook_id = NEW.webhook_id, secret_id = NEW.secret_id,
                signed_at = NEW.signed_at, first_outcome = {first_outcome("NEW.outcome")}
            WHERE seq = NEW.event_seq AND events.secret_id IS NULL AND {is_first("NEW")};
            IF FOUND THEN
                RETURN NULL;
            END IF;
        END IF;
        RETURN NEW;
    END $$
    """,
    "CREATE TRIGGER fold BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION fold_event()",
    "CREATE TRIGGER fold BEFORE INSERT OR UPDATE ON receipts FOR EACH ROW EXECUTE FUNCTION fold_receipt()",
    "CREATE TABLE fold_progress AS SELECT 0::bigint AS after, coalesce(max(seq), 0) AS until FROM events",
)

# Without statistics of the new columns the planner expects a page of one row, so each join has an index.
# `+ 0` keeps it from reading all receipts in their order until it meets the first one of an event.
FOLD = f"""
    WITH page AS (
        SELECT seq, origin, status, secret_id, received_at, body_sha256 FROM events
        WHERE seq > {{after}} AND seq <= {{last}} AND digest IS NULL
        ORDER BY seq FOR NO KEY UPDATE SKIP LOCKED
    ),
    found AS (
        SELECT events.seq AS of_event, {digest("events")} AS bytes, receipts.seq AS receipt,
            receipts.webhook_id, receipts.secret_id, receipts.signed_at,
            {first_outcome("receipts.outcome")} AS first_outcome
        FROM page AS events LEFT JOIN LATERAL (
            SELECT * FROM receipts WHERE event_seq = events.seq ORDER BY receipts.seq + 0 LIMIT 1
        ) AS receipts ON events.secret_id IS NULL AND {is_first("receipts")}
    ),
    removed AS (
        DELETE FROM receipts WHERE seq IN (SELECT receipt FROM found WHERE receipt IS NOT NULL)
    ),
    others AS (
        SELECT seq FROM receipts WHERE event_seq > {{after}} AND event_seq <= {{last}} AND digest IS NULL
            AND seq NOT IN (SELECT receipt FROM found WHERE receipt IS NOT NULL)
        ORDER BY seq FOR NO KEY UPDATE SKIP LOCKED
    ),
    converted AS (
        UPDATE receipts SET digest = {digest("receipts")} WHERE seq IN (SELECT seq FROM others)
    )
    UPDATE events SET digest = bytes, webhook_id = coalesce(events.webhook_id, found.webhook_id),
        secret_id = coalesce(events.secret_id, found.secret_id),
        signed_at = coalesce(events.signed_at, found.signed_at),
        first_outcome = coalesce(events.first_outcome, found.first_outcome)
    FROM found WHERE events.seq = of_event
"""
LEFT = """
    SELECT EXISTS (SELECT FROM events WHERE seq > {after} AND seq <= {last} AND digest IS NULL)
        OR EXISTS (SELECT FROM receipts WHERE event_seq > {after} AND event_seq <= {last} AND digest IS NULL)
"""
SWAP = (
    *(f"DROP TRIGGER fold ON {table}" for table in ("events", "receipts")),
    *(f"DROP FUNCTION fold_{name}()" for name in ("event", "receipt")),
    "DROP TABLE fold_progress",
    *(
        f"ALTER TABLE {table} {change}"
        for table in ("events", "receipts")
        for change in (
            "ALTER COLUMN digest SET NOT NULL",
            "DROP CONSTRAINT digest_known",
            "DROP COLUMN body_sha256",
            "RENAME COLUMN digest TO body_sha256",
        )
    ),
)


def downgrade() -> None:
    names = "event_seq, webhook_id, secret_id, signed_at, received_at, body_sha256, outcome"
    op.execute(f"""
        INSERT INTO receipts ({names})
        SELECT seq, webhook_id, secret_id, signed_at, received_at, body_sha256,
            coalesce(first_outcome, {FOLLOWS})
        FROM events WHERE secret_id IS NOT NULL ORDER BY seq
    """)
    for table in ("events", "receipts"):
        if op.get_bind().dialect.name == "postgresql":
            change = "ALTER COLUMN body_sha256 TYPE VARCHAR(64) USING encode(body_sha256, 'hex')"
            op.execute(f"ALTER TABLE {table} {change}")
        else:
            op.execute(f"UPDATE {table} SET body_sha256 = lower(hex(body_sha256))")
            with op.batch_alter_table(table) as batch:
                batch.alter_column(
                    "body_sha256",
                    existing_type=sa.LargeBinary(),
                    type_=sa.String(64),
                    existing_nullable=False,
                )
    for name in COLUMNS:
        op.drop_column("events", name)
