"""A selection of events for replays, exports and lists."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Final, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, and_, exists, select

from receiver.db.array_parameters import among
from receiver.db.connection import SqlConnection
from receiver.db.sources import find_event_ids
from receiver.db.statements import between, equal
from receiver.db.tables import deliveries, events, jobs

_Word = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]*$")]

_LIKE: Final = {"\\": r"\\", "%": r"\%", "_": r"\_", "*": "%", "?": "_"}


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("is before the year 1 or after 9999 in UTC") from None


_Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""A time; without a zone it is UTC."""


class Selection(BaseModel):
    """The events that match all given filters; without filters all events."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    ids: Annotated[tuple[_Word, ...], Field(max_length=10_000)] = ()
    """Ids of events, or Clipia's `request_id`s."""
    since: _Moment | None = None
    until: _Moment | None = None
    """Received at or after `since` and before `until`."""
    status: Literal["OK", "ERROR"] | None = None
    model: _Word | None = None
    """A slug, or a glob such as `seedance-*`."""
    source: _Word | None = None
    caller: _Word | None = None
    """The caller that submitted its job."""
    destination: _Word | None = None
    delivery_state: Literal["pending", "delivered", "dead"] | None = None
    """Events with a delivery in this state, and to `destination` if that is given."""

    async def conditions(self, connection: SqlConnection) -> list[ColumnElement[bool]]:
        """Return the conditions on `events`."""
        found = equal(events, {"status": self.status, "source": self.source})
        found += between(events.c.received_at, self.since, self.until)
        if self.ids:
            found.append(_is_among(await find_event_ids(connection, self.ids)))
        if self.model is not None:
            found.append(_globbed(self.model, connection.dialect.name))
        if self.caller is not None:
            same = and_(jobs.c.source == events.c.source, jobs.c.request_id == events.c.request_id)
            found.append(exists().where(same, jobs.c.caller == self.caller))
        wanted = equal(deliveries, {"destination": self.destination, "state": self.delivery_state})
        if wanted:
            found.append(exists().where(deliveries.c.event_seq == events.c.seq, *wanted))
        return found

    async def find_seqs(self, connection: SqlConnection) -> dict[str, list[int]]:
        """Return the `seq`s of the events that each of `ids` stands for."""
        ids = await find_event_ids(connection, self.ids)
        rows = await connection.execute(select(events.c.id, events.c.seq).where(_is_among(ids)))
        seqs: dict[UUID, int] = {row.id: row.seq for row in rows}
        return {key: [seqs[id_] for id_ in found if id_ in seqs] for key, found in ids.items()}


def _is_among(ids: Mapping[str, set[UUID]]) -> ColumnElement[bool]:
    # An array is one parameter: 10,000 ids for each source are more parameters than a statement may have.
    return among(events.c.id, "ids").params(ids={id_ for found in ids.values() for id_ in found})


def _globbed(pattern: str, dialect: str) -> ColumnElement[bool]:
    if not set(pattern) & set("*?"):
        return events.c.model == pattern
    if dialect == "sqlite":
        # LIKE of SQLite ignores case.
        return events.c.model.op("GLOB", is_comparison=True)(pattern.replace("[", "[[]"))
    escaped = "".join(_LIKE.get(character, character) for character in pattern)
    return events.c.model.like(escaped, escape="\\")
