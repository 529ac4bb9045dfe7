"""`/v1/events/{id}/receipts/{seq}/promote`: a conflicting body becomes the body of its event."""

from dataclasses import asdict
from typing import Any, Final

from starlette.responses import Response

from receiver.api.endpoints import Call, Endpoint, json_response, not_found
from receiver.api.events import load_event
from receiver.api.parameters import Flag, Parameters
from receiver.db import reads
from receiver.db.database import Database
from receiver.promotions import Promoted, Promotions

MAX_DIGITS: Final = 18
"""Of the number of a receipt."""

_PROMOTED: Final[dict[str, Any]] = {
    "event_id": "8e4e5e6d-3274-5a32-9fdc-8803b0a2d779",
    "request_id": "c7b6521b-55d1-46c4-8952-f1af51482c78",
    "receipt": 42,
    "former_receipt": 43,
    "status_before": "ERROR",
    "status": "OK",
    "cost": 12,
    "files_kept": 0,
    "files_added": 1,
    "files_superseded": 0,
    "deliveries_canceled": 0,
    "destinations": ["orders"],
    "replay_id": "01a1fdfe-da8d-7f2d-8a66-991a87796372",
}


class PromoteBody(Parameters):
    """A receipt."""

    dry_run: Flag = False
    """Only show the result."""


class PromotionEndpoints:
    """The endpoint needs the scope `operate`."""

    def __init__(self, database: Database, promotions: Promotions) -> None:
        self._database = database
        self._promotions = promotions

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="POST",
                path="/v1/events/{id}/receipts/{seq}/promote",
                scope="operate",
                handler=self._promote,
                name="promote_receipt",
                summary="Make the body of a conflicting receipt the event's body, and send it",
                body=PromoteBody,
                body_is_optional=True,
                body_example={"dry_run": True},
                answer=Promoted,
                example=_PROMOTED,
                errors=("not_found", "ambiguous", "not_promotable", "not_settled", "not_configured"),
            ),
        ]

    async def _promote(self, call: Call[None, PromoteBody]) -> Response:
        key, seq = (str(call.request.path_params[name]) for name in ("id", "seq"))
        if not (seq.isascii() and seq.isdigit() and len(seq) <= MAX_DIGITS):
            raise not_found("receipt")
        await load_event(self._database, key, reads.find_event)
        body = await call.read_body()
        done = await self._promotions.promote(
            key, int(seq), by=call.caller.name, reason=call.record.reason, dry_run=body.dry_run
        )
        if done is None:
            raise not_found("receipt of this event")
        return json_response(asdict(done))
