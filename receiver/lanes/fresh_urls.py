"""Fresh URLs: if a file is missing at its old URL, Clipia is asked for the present one."""

import asyncio
import time
from typing import Final

import structlog

from receiver.clipia.client import Call, ClipiaClient
from receiver.core.output_files import FileRules
from receiver.core.payload import parse, result_body
from receiver.db import accounts
from receiver.db.database import Database
from receiver.db.rows import MediaRow, StoredEvent
from receiver.errors import ClipiaUnavailable, DatabaseUnavailable, RequestError, UnrecognizedBody
from receiver.settings import DEFAULT_SOURCE

ANSWER_SECONDS: Final = 60.0
"""How long an answer is used for the other files of its event."""

Urls = dict[str | None, str]
"""The URLs of a result's files, by their field."""

log = structlog.get_logger()


class FreshUrls:
    """Asks Clipia for the present URLs of files, within the polls' share of the account's rate limit."""

    def __init__(self, database: Database, client: ClipiaClient, *, rules: FileRules | None = None) -> None:
        """`rules` must be the ones by which the event's files were listed."""
        self._database = database
        self._client = client
        self._rules = rules or FileRules()
        self._answers: dict[int, tuple[float, asyncio.Task[Urls]]] = {}

    async def find(self, event: StoredEvent, file: MediaRow) -> str | None:
        """Return a file's present URL, None if it has none.

        Raises ClipiaUnavailable or DatabaseUnavailable if Clipia cannot be asked now.
        """
        if event.source != DEFAULT_SOURCE:
            return None  # the event belongs to another account, and CLIPIA_KEY does not open it
        now = time.monotonic()
        self._answers = {seq: kept for seq, kept in self._answers.items() if kept[0] > now}
        if event.seq not in self._answers:
            asking = asyncio.create_task(self._ask(event), name=f"fresh URLs of {event.request_id}")
            self._answers[event.seq] = (now + ANSWER_SECONDS, asking)
        try:
            urls = await asyncio.shield(self._answers[event.seq][1])
        except (ClipiaUnavailable, DatabaseUnavailable):
            self._answers.pop(event.seq, None)
            raise
        except (RequestError, UnrecognizedBody) as error:
            self._answers.pop(event.seq, None)
            log.warning("no fresh URL", request_id=event.request_id, reason=error.reason)
            return None
        return urls.get(self._field_of(event, file))

    async def _ask(self, event: StoredEvent) -> Urls:
        async with self._database.write() as connection:
            quota, now = await accounts.lock(connection, self._client.account)
            if not quota.allowed_polls(now):
                raise ClipiaUnavailable(
                    "no call is left in the rate limit", reason="budget", may_have_arrived=False
                )
            await accounts.save(connection, self._client.account, quota.after_calls("poll", 1, now))
        result = await self._client.result(event.request_id, call=Call())
        generation = parse(result_body(event.request_id, "COMPLETED", result or b"{}"))
        return {ref.field: ref.url for ref in generation.list_files(self._rules).files if ref.skip is None}

    def _field_of(self, event: StoredEvent, file: MediaRow) -> str | None:
        """Return the field of the output that has a file; releases before 0010 did not record it."""
        if file.field is not None:
            return file.field
        files = parse(event.body).list_files(self._rules).files
        return next((ref.field for ref in files if ref.url == file.url), None)
