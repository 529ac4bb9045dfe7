"""`/v1/events/{id}/links` and `/give-up`, and `/v1/verification`: files of events for an operator."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from receiver.api.endpoints import Call, Endpoint, json_response, list_response, not_found
from receiver.api.events import load_event
from receiver.api.parameters import Flag, IdCursor, Moment, Parameters
from receiver.core.output_files import Variant
from receiver.db import outbox, reads
from receiver.db.database import Database
from receiver.db.selection import Selection
from receiver.errors import RequestError, StorageUnavailable
from receiver.media import Storage
from receiver.verification import Verified, verify_part

MAX_HOURS: Final = 168
"""A signed URL of a bucket is valid for a week at most."""

_FILE_LINK: Final[dict[str, Any]] = {
    "variant": "original",
    "uri": "s3://media/c7b6521b/00-original.png",
    "content_type": "image/png",
    "link": "https://s3.example.com/media/c7b6521b/00-original.png?X-Amz-Signature=…",
}
_VERIFIED: Final[dict[str, Any]] = {
    "intact": 199,
    "flagged": [],
    "damaged": [
        {
            "id": "01a1fe1f-4d6d-74d7-af73-a0b5ac94520f",
            "kind": "image",
            "storage_key": "c7b6521b/00-original.png",
            "uri": "file:///data/media/c7b6521b/00-original.png",
            "size": 1024,
            "sha256": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
            "warning": None,
            "request_id": "c7b6521b-55d1-46c4-8952-f1af51482c78",
            "finding": "changed",
            "error": None,
        }
    ],
    "total": 1204,
    "next": "01a1fe1f-4d6d-74d7-af73-a0b5ac94520f",
}


class LinksQuery(Parameters):
    """How long links are valid."""

    hours: Annotated[int, Field(ge=1, le=MAX_HOURS)] = 1
    """Hours until they expire."""


class FileLink(TypedDict):
    """A link to a stored file."""

    variant: Variant
    uri: str
    content_type: str | None
    link: str
    """It needs no credentials for the bucket."""


class GiveUpBody(Parameters):
    """Pending downloads."""

    dry_run: Flag = False
    """Only count."""


class GivenUp(TypedDict):
    """Downloads that were given up."""

    given_up: int


class VerificationQuery(Parameters):
    """A part of the stored files."""

    cursor: IdCursor = None
    """The `next` of the part before."""
    since: Moment | None = None
    """Stored at or after this time."""


class MediaEndpoints:
    """The endpoints need the scope `operate`."""

    def __init__(self, database: Database, *, open_storage: Callable[[], Storage]) -> None:
        self._database = database
        self._open_storage = open_storage

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="GET",
                path="/v1/events/{id}/links",
                scope="operate",
                handler=self._link,
                name="link_files",
                summary="Make links to an event's stored files that work without credentials for the bucket",
                query=LinksQuery,
                answer=FileLink,
                is_list=True,
                example=_FILE_LINK,
                errors=("not_found", "not_linkable", "not_configured"),
            ),
            Endpoint(
                method="POST",
                path="/v1/events/{id}/give-up",
                scope="operate",
                handler=self._give_up,
                name="give_up_files",
                summary="Give up an event's pending downloads, so that its messages are sent without them",
                body=GiveUpBody,
                body_is_optional=True,
                body_example={"dry_run": True},
                answer=GivenUp,
                example={"given_up": 1},
                errors=("not_found",),
            ),
            Endpoint(
                method="GET",
                path="/v1/verification",
                scope="operate",
                handler=self._verify,
                name="verify_files",
                summary="Read a part of the stored files, and compare each with its checksum",
                query=VerificationQuery,
                answer=Verified,
                example=_VERIFIED,
                errors=("not_configured",),
            ),
        ]

    @asynccontextmanager
    async def _storage(self) -> AsyncIterator[Storage]:
        # Opened for a call alone: a process without a worker must be able to start without a storage.
        storage = await asyncio.to_thread(self._open_storage)
        try:
            yield storage
        except StorageUnavailable as error:
            raise RequestError(str(error), code="service_unavailable", type_="api_error") from None
        finally:
            await storage.close()

    async def _link(self, call: Call[LinksQuery, None]) -> Response:
        event = await load_event(self._database, call.key, reads.show_event)
        stored = [row for row in event["media"] if row["state"] == "stored"]
        async with self._storage() as storage:
            return list_response([await _link(storage, row, call.query.hours * 3600) for row in stored])

    async def _give_up(self, call: Call[None, GiveUpBody]) -> Response:
        # PostgreSQL rejects NUL in a text parameter.
        key = call.key.replace("\0", "\N{REPLACEMENT CHARACTER}")
        async with self._database.read() as connection:
            # Not validated: a key of any length is one that no event has.
            seqs = (await Selection.model_construct(ids=(key,)).find_seqs(connection))[key]
        if not seqs:
            raise not_found("event")
        body = await call.read_body()
        async with self._database.read() if body.dry_run else self._database.write() as connection:
            if body.dry_run:
                numbers = [await outbox.count_pending_media(connection, seq) for seq in seqs]
            else:
                by = call.caller.name
                numbers = [await outbox.give_up_media(connection, seq, by=by) for seq in seqs]
        return json_response({"given_up": sum(numbers)})

    async def _verify(self, call: Call[VerificationQuery, None]) -> Response:
        query = call.query
        async with self._storage() as storage:
            found = await verify_part(self._database, storage, after=query.cursor, since=query.since)
        return json_response(found)


async def _link(storage: Storage, row: Mapping[str, Any], seconds: int) -> dict[str, Any]:
    if row["uri"] != storage.uri(row["storage_key"]):
        message = f"{row['uri']} is not in the storage of RECEIVER_STORAGE_URL"
        raise RequestError(message, code="not_linkable")
    found = await storage.link(row["storage_key"], seconds=seconds)
    if found is None:
        message = "only files in a bucket (s3://, gs://, az://) can have links; these are in a folder"
        raise RequestError(message, code="not_linkable")
    return {name: row[name] for name in ("variant", "uri", "content_type")} | {"link": found}
