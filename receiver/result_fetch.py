"""Fetches a result that never arrived: Clipia is asked once, and the result is stored like a webhook's."""

import time
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, cast

import structlog

from receiver.clipia.client import Call
from receiver.core.lane_names import FAN_OUT_LANE, Wake
from receiver.core.payload import is_request_id, result_body
from receiver.db import jobs, reads
from receiver.db.database import Database
from receiver.errors import ClipiaUnavailable, RefusedByClipia, RequestError, UnrecognizedBody
from receiver.ingest import Ingest
from receiver.lanes.poll import learn
from receiver.settings import DEFAULT_SOURCE
from receiver.submitter import Submitter

NOT_FOUND_STATUS: Final = 404

log = structlog.get_logger()


class FetchedResult(NamedTuple):
    """The event of a result."""

    event_id: str
    is_new: bool
    """Whether it was stored now."""


class ResultFetch:
    """Fetches results of the account of CLIPIA_KEY, also of jobs that were submitted elsewhere."""

    def __init__(
        self, database: Database, submitter: Submitter, *, sources: Sequence[str], wake: Wake
    ) -> None:
        """Take the names of the configured sources."""
        self._database = database
        self._submitter = submitter
        # Jobs of this receiver that are polled need no source with a secret.
        self._sources: Final = tuple(sources) or (DEFAULT_SOURCE,)
        # Without secrets it records polled results only.
        self._ingest = Ingest(
            database,
            secrets={},
            tolerance=0,
            clock=time.time,
            on_accepted=lambda: wake(FAN_OUT_LANE),
        )

    async def fetch(self, request_id: str, *, source: str | None = None) -> FetchedResult:
        """Store the result of a generation, unless its event is stored already.

        `source` is the one that its webhook would name; None: it follows from the job or the settings.
        Raises RequestError if the source is wrong or missing, or if Clipia does not know the generation or
        has not finished it; ClipiaUnavailable, DatabaseUnavailable, and SettingsError without CLIPIA_KEY.
        """
        if not is_request_id(request_id):
            raise RequestError("request_id: this is no id of Clipia's", code="invalid_request")
        async with self._database.read() as connection:
            known = await reads.find_event(connection, request_id)
            own = await jobs.find_by_request(connection, DEFAULT_SOURCE, request_id)
        if known is not None and known["state"] != "unrecognized":
            return FetchedResult(str(known["id"]), is_new=False)
        source = self._choose(source, own=own is not None)
        body = await self._ask(request_id)
        received = await self._ingest.record_result(source, body)
        is_new = received.outcome == "accepted"
        log.info(
            "result fetched", request_id=request_id, source=source, event_id=received.event_id, new=is_new
        )
        return FetchedResult(received.event_id, is_new=is_new)

    def _choose(self, given: str | None, *, own: bool) -> str:
        """Return the source; `own` is true for a job of this receiver. Raises RequestError.

        An event's id is made of it: with another source, a webhook that comes later would be a second event.
        """
        choices = (DEFAULT_SOURCE,) if own else self._sources
        if given in choices:
            return given
        if given is None and len(choices) == 1:
            return choices[0]
        names = ", ".join(choices)
        if given is None:
            text = f"write the one whose webhook would have brought the result: {names}"
        elif own:
            text = f"the job is this receiver's, so its source is {names}"
        else:
            text = f"no source has this name; the settings have {names}"
        raise RequestError(f"source: {text}", code="invalid_request")

    async def _ask(self, request_id: str) -> bytes:
        """Return the body that the webhook would have had."""
        client, call = self._submitter.client, Call()
        try:
            status = await client.status(request_id, call=call)
            result = await client.result(request_id, call=call) if status.terminal else None
        except RefusedByClipia as error:
            if error.status != NOT_FOUND_STATUS:
                raise
            raise RequestError(
                f"Clipia does not know the request {request_id!r}: check the id, and that CLIPIA_KEY is of "
                "the account that submitted it",
                code="unknown_request",
            ) from None
        finally:
            await learn(self._database, client.account, call.headers, calls=2)
        if result is None:
            progress = "" if status.progress is None else f", {status.progress} %"
            raise RequestError(
                f"Clipia has not finished the request {request_id!r} ({status.status}{progress}): ask again "
                "later",
                code="not_finished",
            )
        ended = cast("Literal['COMPLETED', 'FAILED', 'CANCELED']", status.status)
        try:
            return result_body(request_id, ended, result)
        except UnrecognizedBody:
            raise ClipiaUnavailable("Clipia's result is not JSON", reason="unreadable") from None
