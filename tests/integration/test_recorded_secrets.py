"""`receiver check` masks secrets in recorded errors, on both databases."""

import json

import pytest
from sqlalchemy import Table, insert, select, update
from support.commands import run_command
from support.history import fill, fill_jobs
from support.payloads import SECRET

from receiver.db import masking
from receiver.db.database import Database
from receiver.db.masking import mask_error, mask_errors
from receiver.db.tables import accounts, attempts, deliveries, jobs, media

CANARY = "cAnArY8f3b61d2e9b7c4"
LEAKED = f"no answer (LocalProtocolError: Illegal header value b'Bearer clipia_live_{CANARY}\\n')"
COUNT = 5


async def leak(database: Database) -> None:
    """Record errors with a key, as earlier releases did, and some without."""
    await fill(database, COUNT)
    await fill_jobs(database)
    as_json = json.dumps({"code": "no_answer", "message": LEAKED, "status": 503})
    async with database.write() as connection:
        await connection.execute(update(jobs).values(error=as_json))
        await connection.execute(update(attempts).values(error=LEAKED))
        await connection.execute(update(deliveries).values(error="PublishFailed: nothing listens"))
        await connection.execute(
            update(media).where(media.c.event_seq == 2).values(error=f"see https://u:{CANARY}@host/x")
        )
        values = {"requests_per_minute": 1, "in_flight_limit": 1, "probes": 0, "pause": LEAKED}
        moments = ("submits_until", "polls_until", "asks_until", "calls_after", "submits_after")
        rest = dict.fromkeys((*moments, "in_flight_refused_at", "paused_at"), 0.0)
        await connection.execute(insert(accounts).values(id="live-kit", **values, **rest))


async def read(database: Database, table: Table, column: str = "error") -> list[str | None]:
    """Return the texts of a column."""
    async with database.read() as connection:
        return list((await connection.execute(select(table.c[column]))).scalars())


async def test_secrets_in_recorded_errors_are_masked_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: keys in errors are masked in every table; other errors stay, and a second run changes none."""
    monkeypatch.setattr(masking, "PAGE", 2)
    await leak(database)
    assert await mask_errors(database) == {"jobs": COUNT, "attempts": 2 * COUNT, "media": 1, "accounts": 1}
    found = [
        *await read(database, jobs),
        *await read(database, attempts),
        *await read(database, media),
        *await read(database, accounts, "pause"),
    ]
    assert CANARY[:8] not in repr(found)
    assert CANARY[-8:] not in repr(found)
    assert {json.loads(text or "")["status"] for text in await read(database, jobs)} == {503}
    assert set(await read(database, deliveries)) == {"PublishFailed: nothing listens"}
    assert await mask_errors(database) == {}


async def test_check_masks_and_counts_recorded_secrets(database: Database, database_url: str) -> None:
    """G8: `receiver check` masks the errors of earlier releases and prints their number, but only once."""
    await leak(database)
    settings = {"CLIPIA_WEBHOOK_SECRET": SECRET, "RECEIVER_DATABASE_URL": database_url}
    first = run_command("check", settings=settings)
    assert first.returncode == 0, first.stderr
    said = f"masked secrets in stored errors ({COUNT} of jobs, {2 * COUNT} of attempts"
    assert said in first.stdout.decode()
    assert CANARY[:8] not in repr([await read(database, jobs), await read(database, attempts)])
    second = run_command("check", settings=settings)
    assert (second.returncode, b"masked secrets" in second.stdout) == (0, False)


@pytest.mark.parametrize(
    "text",
    ["", "x", "[1]", '"clipia"', '{"a": 1}', '{"message":  "spaces stay"}', "PublishFailed: é nothing"],
)
def test_other_errors_stay_as_they_are(text: str) -> None:
    """G8: a text without a secret is not updated."""
    assert mask_error(text) == text
