"""`/v1/freeze`: while submissions are frozen, no job is accepted or sent to Clipia."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, json_response
from receiver.api.parameters import Flag, Parameters
from receiver.core.retry import KEY_VALID_SECONDS
from receiver.db import submission_freezes
from receiver.db.database import Database
from receiver.errors import RequestError
from receiver.lanes.attempts import error_json


class FreezeBody(Parameters):
    """A freeze of submissions."""

    reason: Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")] = ""
    """For the record."""
    restored: Flag = False
    """Whether the database was restored, so that keys used since the backup are lost."""


class FreezeState(TypedDict):
    """Whether submissions are frozen."""

    frozen: bool
    by: str | None
    reason: str | None
    restored: bool
    frozen_at: datetime | None


class Thawed(TypedDict):
    """The end of a freeze."""

    unsure: list[UUID]
    """Jobs that may have been sent since the backup, and whose key has expired."""


class FreezeEndpoints:
    """Reading needs the scope `read`, because it explains why a job waits."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="GET",
                path="/v1/freeze",
                scope="read",
                handler=self._show,
                name="show_freeze",
                summary="Show whether submissions are frozen",
                answer=FreezeState,
                example=examples.FREEZE,
            ),
            Endpoint(
                method="POST",
                path="/v1/freeze",
                scope="operate",
                handler=self._freeze,
                name="freeze_submissions",
                summary="Accept and submit no jobs",
                body=FreezeBody,
                body_is_optional=True,
                body_example={"reason": "the database was restored", "restored": True},
                answer=FreezeState,
                example=examples.FREEZE,
            ),
            Endpoint(
                method="DELETE",
                path="/v1/freeze",
                scope="operate",
                handler=self._thaw,
                name="thaw_submissions",
                summary="Accept and submit jobs again",
                answer=Thawed,
                example={"unsure": []},
                errors=("not_frozen",),
            ),
        ]

    async def _show(self, _call: Call[None, None]) -> Response:
        return json_response(await self._read())

    async def _freeze(self, call: Call[None, FreezeBody]) -> Response:
        body = await call.read_body()
        async with self._database.write() as connection:
            await submission_freezes.freeze(
                connection, by=call.caller.name, reason=call.record.reason or "", restored=body.restored
            )
        return json_response(await self._read())

    async def _thaw(self, _call: Call[None, None]) -> Response:
        text = error_json(
            "restored", "The database was restored: this job may have been sent since the backup."
        )
        async with self._database.write() as connection:
            unsure = await submission_freezes.thaw(connection, key_holds=KEY_VALID_SECONDS, error=text)
        if unsure is None:
            raise RequestError("submissions are not frozen", code="not_frozen")
        return json_response({"unsure": unsure})

    async def _read(self) -> FreezeState:
        async with self._database.read() as connection:
            found = await submission_freezes.find(connection)
        if found is None:
            return FreezeState(frozen=False, by=None, reason=None, restored=False, frozen_at=None)
        return FreezeState(
            frozen=True,
            by=found.by,
            reason=found.reason,
            restored=found.restored,
            frozen_at=found.frozen_at,
        )
