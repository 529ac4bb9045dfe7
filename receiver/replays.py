"""Replays: orders to send stored events again. The replay lane of the workers carries them out."""

import hashlib
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Final, Self

import orjson
import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from receiver.core.lane_names import REPLAY_LANE, Wake, wake_no_lane
from receiver.core.request_values import check_key, invalid_request
from receiver.core.routing import RoutingFacts, mismatch
from receiver.db import replays, tables
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import NewReplay, new_id
from receiver.db.selection import Selection
from receiver.db.statements import find_known
from receiver.db.views import ReplayCounts, ReplayDetails, ReplayHead
from receiver.destination_settings import FilterSettings
from receiver.errors import RequestError
from receiver.lanes.targets import load_facts
from receiver.masking import mask

MAX_CANCELED: Final = 5000
"""Deliveries that one transaction cancels."""

log = structlog.get_logger()


class ReplayOptions(BaseModel):
    """How to replay events."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )

    to: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    """Destinations; all that are configured if none is given. Their filters apply to replays too."""
    media: bool = False
    """Download files again if they are missing, have another checksum or are not media."""
    force: bool = False
    """With `media`: download intact files again too."""
    rate: Annotated[float, Field(ge=0.001, le=100_000)] | None = None
    """Largest number of events per second."""
    reason: Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")] = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if "to" in self.model_fields_set and not self.to:
            raise ValueError("to is empty: leave it out for all destinations")
        if self.force and not self.media:
            raise ValueError("force needs media")
        return self

    @classmethod
    def read(cls, values: object) -> Self:
        """Validate an order. Raises RequestError, which names the wrong field."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise invalid_request(error) from None


class ReplayRequest(ReplayOptions):
    """An order for a replay, as the API and the command take it."""

    selection: Selection = Selection()
    all: bool = False
    """Select all events. Required if `selection` is empty."""

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        # An empty list of ids is a mistake of the caller, and must not select all events.
        if "ids" in self.selection.model_fields_set and not self.selection.ids:
            raise ValueError("selection.ids is empty: leave it out, or name events")
        if self.selection == Selection() and not self.all:
            raise ValueError('say which events: a selection, or "all": true')
        return self


class Replays:
    """Orders, shows and cancels replays."""

    def __init__(
        self,
        database: Database,
        filters: Mapping[str, FilterSettings],
        *,
        wake: Wake = wake_no_lane,
        max_canceled: int = MAX_CANCELED,
    ) -> None:
        """Take the filters of the configured destinations, by name."""
        self._database = database
        self._filters = filters
        self._wake = wake
        self._max_canceled = max_canceled

    async def order(self, request: ReplayRequest, *, key: str | None, caller: str) -> ReplayDetails:
        """Order a replay, or return the one that this caller has ordered under `key` before.

        Raises RequestError if a destination is unknown, or the key belongs to a different order.
        """
        if key is not None:
            check_key(key)
        order = self.make_order(request, key=key, caller=caller)
        order_id = order.id
        # Counting is slow, so it is done before the transaction that writes.
        async with self._database.read() as connection:
            scope = await _find_scope(connection, request.selection)
            matched = await replays.count(connection, request.selection, scope)
        async with self._database.write() as connection:
            if not await replays.insert_order(connection, order, scope, matched=matched):
                known = await find_known(connection, tables.replays, caller, order.idempotency_key)
                if known is None or known.fingerprint != order.fingerprint:
                    message = "this Idempotency-Key was used for another replay: use a new one"
                    raise RequestError(message, code="idempotency_key_reuse")
                order_id = known.id
            found = await replays.show(connection, order_id)
        if found is None:
            raise RequestError("the replay was deleted meanwhile", code="not_found")
        log.info("replay ordered", replay_id=str(order_id), by=caller, events=found["matched"])
        self._wake(REPLAY_LANE)
        return found

    @property
    def destinations(self) -> Sequence[str]:
        """The names of the configured destinations."""
        return list(self._filters)

    def find_destinations(self, facts: RoutingFacts) -> list[str]:
        """Return the destinations with a filter that an event passes."""
        return [name for name, wanted in self._filters.items() if mismatch(wanted, facts) is None]

    def make_order(self, request: ReplayRequest, *, key: str | None, caller: str) -> NewReplay:
        """Make an order that is not stored yet. Raises RequestError if a destination is unknown."""
        # Earlier releases had no `force`; without it, a repeated order has the same fingerprint as theirs.
        known = ReplayRequest.model_fields.keys() - (set() if request.force else {"force"})
        content = request.model_dump(mode="json", include=known)
        order_id = new_id()
        return NewReplay(
            id=order_id,
            caller=caller,
            idempotency_key=key or str(order_id),
            fingerprint=hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest(),
            reason=mask(request.reason),
            selection=content["selection"],
            destinations=self._destinations(request),
            media=request.media,
            force=request.force,
            rate=request.rate,
        )

    async def dry_run(self, request: ReplayRequest) -> ReplayCounts:
        """Count the events that a replay would go through, and its deliveries by destination."""
        filters = {name: self._filters[name] for name in self._destinations(request)}
        counts: Counter[str] = Counter(dict.fromkeys(filters, 0))
        events = 0
        async with self._database.read() as connection:
            scope = await _find_scope(connection, request.selection)
        while scope.after_seq < scope.until_seq:
            async with self._database.read() as connection:
                page, reached = await replays.select_events(connection, request.selection, scope)
                facts = await load_facts(connection, page)
            events += len(page)
            scope = replace(scope, after_seq=reached)
            counts.update(
                name for each in facts for name, wanted in filters.items() if mismatch(wanted, each) is None
            )
        return {"events": events, "deliveries": dict(counts)}

    async def show(self, replay_id: uuid.UUID) -> ReplayDetails | None:
        """Return a replay with its progress."""
        async with self._database.read() as connection:
            return await replays.show(connection, replay_id)

    async def list_orders(self, *, limit: int, before: int | None = None) -> list[ReplayHead]:
        """Return replays, newest first."""
        async with self._database.read() as connection:
            return await replays.list_orders(connection, limit=limit, before=before)

    async def cancel(self, replay_id: uuid.UUID, *, by: str) -> bool:
        """Cancel a replay and its waiting deliveries; False if it has ended already."""
        async with self._database.write() as connection:
            canceled = await replays.cancel(connection, replay_id)
        dropped = self._max_canceled
        while dropped >= self._max_canceled:
            async with self._database.write() as connection:
                dropped = await replays.cancel_deliveries(connection, replay_id, limit=self._max_canceled)
            canceled |= dropped > 0
        if canceled:
            log.warning("replay canceled", replay_id=str(replay_id), by=by)
        return canceled

    def _destinations(self, request: ReplayRequest) -> list[str]:
        if unknown := [name for name in request.to if name not in self._filters]:
            message = (
                f"there is no destination {unknown[0]!r}; configured: {', '.join(self._filters) or 'none'}"
            )
            raise RequestError(message, code="invalid_request")
        if not self._filters:
            raise RequestError(
                "no destination is configured: add a [[destinations]] table or set RECEIVER_DESTINATION_URL",
                code="invalid_request",
            )
        return list(request.to or self._filters)


async def _find_scope(connection: SqlConnection, selection: Selection) -> replays.Scope:
    """Return the range of events that a selection may match. Raises RequestError for unknown ids."""
    if selection.ids and (unknown := await replays.find_unknown(connection, selection)):
        shown = f"{', '.join(map(repr, unknown[:5]))}{' …' if unknown[5:] else ''}"
        raise RequestError(f"there is no event {shown}", code="invalid_request")
    return await replays.find_scope(connection, selection)
