"""`/v1/prune` and `/v1/recovery`: old events are deleted, and unrecognized ones recovered, in parts."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Annotated, Any, Final, Self
from uuid import UUID

from pydantic import Field, model_validator
from starlette.responses import Response

from receiver import retention, unrecognized
from receiver.api.endpoints import Call, Endpoint, json_response, list_response
from receiver.api.parameters import Flag, Moment, Parameters, invalid
from receiver.db import retention_runs
from receiver.db.database import Database
from receiver.db.retention_runs import Plan
from receiver.errors import RequestError, StorageUnavailable
from receiver.lanes.attempts import stored_text
from receiver.media import Storage
from receiver.retention import POSITION, Pruned
from receiver.unrecognized import Recovered

MAX_DAYS: Final = 700_000

_PRUNED: Final[dict[str, Any]] = {
    "before": "2026-01-31T12:00:00Z",
    "events": 500,
    "kept": 2,
    "files": 0,
    "files_elsewhere": 0,
    "jobs": 0,
    "rejections": 0,
    "actions": 0,
    "next": "events-502",
    "run": "01a1fdfe-da8d-7f2d-8a66-991a87796372",
}
_RECOVERED: Final[dict[str, Any]] = {
    "was": "01a1fdfe-da8d-7f2d-8a66-991a87796372",
    "event_id": "b3ab93bc-23a9-5fe2-a63c-05a4fe0af24c",
    "request_id": "c7b6521b-55d1-46c4-8952-f1af51482c78",
    "outcome": "accepted",
    "reason": None,
}


class PruneBody(Parameters):
    """Old events."""

    older_than_days: Annotated[int, Field(ge=1, le=MAX_DAYS)] | None = None
    """The events' age, for the first part."""
    before: Moment | None = None
    """That of the first part's answer, for all other parts."""
    next: Annotated[str, Field(pattern=POSITION)] | None = None
    """That of the answer before."""
    run: UUID | None = None
    """That of the first part's answer."""
    dead_letters: Flag = False
    """Delete events with dead letters, too."""
    media: Flag = False
    """Delete the files of these events, too."""
    dry_run: Flag = False
    """Only count."""

    @property
    def is_part(self) -> bool:
        """Whether it goes on with a run: a part gets no record of its own."""
        return self.before is not None

    @model_validator(mode="after")
    def _has_an_age(self) -> Self:
        if (self.older_than_days is None) == (self.before is None):
            raise invalid("older_than_days, before: write one of them")
        return self


class RecoverBody(Parameters):
    """A part of the unrecognized events."""

    cursor: Annotated[str, Field(pattern="^[0-9]{1,18}$")] | None = None
    """The `next` of the part before."""
    dry_run: Flag = False
    """Only show the results."""

    @property
    def is_part(self) -> bool:
        """Whether it goes on with a run."""
        return self.cursor is not None


class UpkeepEndpoints:
    """The endpoints need the scope `operate`."""

    def __init__(self, database: Database, *, open_storage: Callable[[], Storage]) -> None:
        self._database = database
        self._open_storage = open_storage

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="POST",
                path="/v1/prune",
                scope="operate",
                handler=self._prune,
                name="prune_events",
                summary="Delete a batch of old events that need no more work",
                body=PruneBody,
                body_example={"older_than_days": 90},
                answer=Pruned,
                example=_PRUNED,
                errors=("not_configured",),
            ),
            Endpoint(
                method="POST",
                path="/v1/recovery",
                scope="operate",
                handler=self._recover,
                name="recover_events",
                summary="Recover unrecognized events that this release can read",
                body=RecoverBody,
                body_is_optional=True,
                body_example={"dry_run": True},
                answer=Recovered,
                is_list=True,
                example=_RECOVERED,
            ),
        ]

    async def _prune(self, call: Call[None, PruneBody]) -> Response:
        body = await call.read_body()
        run = body.run
        if body.before is None:
            days = body.older_than_days or 0
            done = await retention.begin(self._database, older_than=timedelta(days=days))
            if not body.dry_run:
                plan = Plan(older_than_days=days, media=body.media, dead_letters=body.dead_letters)
                host = socket.gethostname()[:255]
                async with self._database.write() as connection:
                    run = await retention_runs.begin(
                        connection, plan, by=call.caller.name, host=host, before=done.before
                    )
        else:
            done = await retention.resume(self._database, before=body.before, position=body.next)
        call.record.note_run(done.before, body.dead_letters, body.media)
        done = await self._take_part(done, body, run)
        if run is not None and not body.dry_run:
            counts = retention_runs.counts_of(asdict(done))
            async with self._database.write() as connection:
                await retention_runs.add_part(connection, run, counts=counts, is_last=done.next is None)
        return json_response(asdict(replace(done, run=run)))

    async def _take_part(self, done: Pruned, body: PruneBody, run: UUID | None) -> Pruned:
        async with AsyncExitStack() as stack:
            storage = None
            if body.media:
                storage = await asyncio.to_thread(self._open_storage)
                stack.push_async_callback(storage.close)
            parts = retention.prune(
                self._database,
                done,
                dead_letters=body.dead_letters,
                dry_run=body.dry_run,
                storage=storage,
            )
            try:
                return await anext(await stack.enter_async_context(aclosing(parts)))
            except StorageUnavailable as error:
                if run is not None:
                    async with self._database.write() as connection:
                        await retention_runs.fail_part(connection, run, stored_text(error))
                raise RequestError(str(error), code="service_unavailable", type_="api_error") from None

    async def _recover(self, call: Call[None, RecoverBody]) -> Response:
        body = await call.read_body()
        call.record.note_run()
        found, after = await unrecognized.recover_part(
            self._database, after=int(body.cursor or 0), dry_run=body.dry_run
        )
        return list_response([asdict(each) for each in found], None if after is None else str(after))
