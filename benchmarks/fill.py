"""Fill databases with finished events, for the growth benchmark.

The values that differ between events are made in a table first; all rows come from it.
"""

import hashlib
import random
import sqlite3
import sys
import uuid
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from load import result
from support.servers import Postgres

from receiver.db.rows import EVENT_NAMESPACE, event_id

DESTINATION = "bench"
OPEN = 300
"""Dead deliveries of the history, and as many that wait for another attempt."""
CHUNK = 100_000
"""Events of a transaction while a database is filled."""

_INSERTS = (
    """INSERT INTO events (seq, id, source, request_id, origin, state, status, model, cost, body, body_sha256,
        received_at, webhook_id, secret_id, signed_at)
    SELECT n, id, 'clipia', request_id, 'webhook', 'ready', 'OK', 'nano-banana-2', 12, body, sha256, began,
        request_id, 'default', began
    FROM history ORDER BY n""",
    f"""INSERT INTO deliveries (id, event_seq, destination, state, attempts, next_attempt_at, error,
        created_at, finished_at)
    SELECT delivery, n, '{DESTINATION}', state, 1, CASE state WHEN 'pending' THEN later END,
        CASE state WHEN 'delivered' THEN NULL ELSE 'refused' END, began,
        CASE state WHEN 'pending' THEN NULL ELSE ended END
    FROM history ORDER BY n""",
    """INSERT INTO attempts (seq, work_id, number, started_at, duration_ms, outcome)
    SELECT n, delivery, 1, began, 12,
        CASE state WHEN 'delivered' THEN 'succeeded' WHEN 'dead' THEN 'failed' ELSE 'retry' END
    FROM history ORDER BY n""",
    """INSERT INTO jobs (seq, id, caller, idempotency_key, fingerprint, source, model, request, has_webhook,
        provider_key, metadata, state, attempts, created_at, finished_at, account, sent_at, submitted_at,
        updated_at, request_id, cost, charged)
    SELECT n / 10, delivery, 'bench', request_id, request_id, 'clipia', 'nano-banana-2', body, TRUE, id, '{}',
        'completed', 1, began, ended, 'live-bench', began, began, ended, request_id, 12, 12
    FROM history WHERE n % 10 = 0 ORDER BY n""",
)

_POSTGRESQL_HISTORY = """
    SET session_replication_role = replica; -- nothing is looked up for the references: it is there
    SET synchronous_commit = off;
    CREATE TEMPORARY TABLE history AS
    SELECT n, request_id, body, sha256(body) AS sha256,
        encode(set_byte(set_byte(digest, 6, get_byte(digest, 6) & 15 | 80),
            8, get_byte(digest, 8) & 63 | 128), 'hex')::uuid AS id,
        began, began + interval '1 second' AS ended, now() + interval '1 hour' AS later,
        overlay(md5('delivery ' || n) PLACING milliseconds || '7' FROM 1)::uuid AS delivery,
        CASE n % {every} WHEN 0 THEN 'dead' WHEN 1 THEN 'pending' ELSE 'delivered' END AS state
    FROM generate_series({first}, {last}) AS n
    CROSS JOIN LATERAL (
        SELECT md5('history ' || n)::uuid::text AS request_id, now() - ({count} - n) * interval '1 s' AS began
    ) AS named
    CROSS JOIN LATERAL (
        SELECT convert_to('{head}' || request_id || '{tail}', 'UTF8') AS body,
            substr(digest('\\x{namespace}' || convert_to(E'clipia\\n' || request_id, 'UTF8'), 'sha1'), 1, 16)
                AS digest,
            lpad(to_hex((extract(epoch FROM began) * 1000)::bigint), 12, '0') AS milliseconds
    ) AS written
"""

# Drop and create every index, except if new rows only extend it.
_POSTGRESQL_INDEXES = """
    SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname),
        format('ALTER TABLE %s ADD CONSTRAINT %I %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE contype = 'u' AND connamespace = 'public'::regnamespace
    UNION ALL
    SELECT format('DROP INDEX %s', indexrelid::regclass), pg_get_indexdef(indexrelid)
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE relnamespace = 'public'::regnamespace
        AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
"""


def request_of(number: int) -> str:
    """Return the `request_id` of an event of the history."""
    return str(uuid.UUID(hashlib.md5(f"history {number}".encode(), usedforsecurity=False).hexdigest()))


def fill_postgresql(postgres: Postgres, database: str, count: int) -> None:
    """Fill a database; most indexes are dropped before and created after the rows."""

    def run(statement: str) -> str:
        return postgres.sql(statement, database=database).stdout

    run("CREATE EXTENSION pgcrypto; INSERT INTO sources VALUES ('clipia')")
    indexes = [line.split("|") for line in run(_POSTGRESQL_INDEXES).splitlines()]
    run("; ".join(drop for drop, _ in indexes))
    name = request_of(0)
    head, _, tail = result(name).decode().partition(name)
    for numbers in _chunks(count):
        history = _POSTGRESQL_HISTORY.format(
            namespace=EVENT_NAMESPACE.hex,
            first=numbers[0],
            last=numbers[-1],
            count=count,
            every=_every(count),
            head=head,
            tail=tail,
        )
        run("; ".join([history, *_INSERTS]))
        tell(f"PostgreSQL: {numbers[-1]:,} of {count:,} events")
    run("; ".join(["SET maintenance_work_mem = '1GB'", *(make for _, make in indexes)]))
    for table in ("events", "attempts", "jobs"):
        run(f"SELECT setval(pg_get_serial_sequence('{table}', 'seq'), max(seq)) FROM {table}")
    run("VACUUM ANALYZE")
    tell("PostgreSQL: indexes made, vacuumed")


def fill_sqlite(file: str, count: int) -> None:
    """Fill a database file."""
    now, every = datetime.now(UTC), _every(count)

    def moment(value: datetime) -> str:
        return value.replace(tzinfo=None).isoformat(" ", "microseconds")

    def row(number: int) -> tuple[object, ...]:
        began, request_id = now - timedelta(seconds=count - number), request_of(number)
        body = result(request_id)
        return (
            number,
            request_id,
            event_id("clipia", request_id).hex,
            body,
            hashlib.sha256(body).digest(),
            moment(began),
            moment(began + timedelta(seconds=1)),
            moment(now + timedelta(hours=1)),
            f"{int(began.timestamp() * 1000):012x}7{random.getrandbits(76):019x}",
            {0: "dead", 1: "pending"}.get(number % every, "delivered"),
        )

    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.executescript("""
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -2000000;
            INSERT INTO sources VALUES ('clipia');
            CREATE TEMPORARY TABLE history (
                n INTEGER PRIMARY KEY, request_id, id, body, sha256, began, ended, later, delivery, state
            );
        """)
        for numbers in _chunks(count):
            connection.execute("BEGIN")
            connection.execute("DELETE FROM history")
            connection.executemany(f"INSERT INTO history VALUES ({', '.join('?' * 10)})", map(row, numbers))
            for statement in _INSERTS:
                connection.execute(statement)
            connection.execute("COMMIT")
            tell(f"SQLite: {numbers[-1]:,} of {count:,} events")
        connection.execute("PRAGMA journal_mode = WAL")


def _chunks(count: int) -> list[range]:
    return [range(first, min(first + CHUNK, count + 1)) for first in range(1, count + 1, CHUNK)]


def _every(count: int) -> int:
    return max(10, count // OPEN)


def tell(message: str) -> None:
    """Print a message with the time of day."""
    print(f"{datetime.now(UTC):%H:%M:%S} {message}", file=sys.stderr, flush=True)
