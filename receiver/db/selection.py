"""Which events somebody means: for replays, exports and lists."""

import contextlib
import uuid
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, and_, exists, or_

from receiver.db.tables import deliveries, events, jobs

_Word = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]*$")]

_LIKE: Final = {"\\": r"\\", "%": r"\%", "_": r"\_", "*": "%", "?": "_"}


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("is beyond the calendar") from None


_Moment = Annotated[datetime, AfterValidator(_in_utc)]
"""One without a zone is UTC."""


class Selection(BaseModel):
    """Events that fit everything that is given; nothing given is all of them."""

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
    """Who submitted its job."""
    destination: _Word | None = None
    delivery_state: Literal["pending", "delivered", "dead"] | None = None
    """Events with a delivery in this state, to `destination` where that is given."""

    def conditions(self, dialect: str) -> list[ColumnElement[bool]]:
        """Return the conditions on `events`, for a dialect of SQLAlchemy's."""
        found: list[ColumnElement[bool]] = []
        if self.ids:
            found.append(self.has_id())
        found += [
            events.c[name] == value
            for name in ("status", "source")
            if (value := getattr(self, name)) is not None
        ]
        if self.since is not None:
            found.append(events.c.received_at >= self.since)
        if self.until is not None:
            found.append(events.c.received_at < self.until)
        if self.model is not None:
            found.append(_globbed(self.model, dialect))
        if self.caller is not None:
            same = and_(jobs.c.source == events.c.source, jobs.c.request_id == events.c.request_id)
            found.append(exists().where(same, jobs.c.caller == self.caller))
        if self.destination is not None or self.delivery_state is not None:
            wanted = [deliveries.c.event_seq == events.c.seq]
            if self.destination is not None:
                wanted.append(deliveries.c.destination == self.destination)
            if self.delivery_state is not None:
                wanted.append(deliveries.c.state == self.delivery_state)
            found.append(exists().where(*wanted))
        return found

    def has_id(self) -> ColumnElement[bool]:
        """Return the condition that an event is one of `ids`."""
        return or_(events.c.request_id.in_(self.ids), events.c.id.in_(uuids(self.ids)))


def uuids(texts: tuple[str, ...]) -> list[uuid.UUID]:
    """Return the texts that are UUIDs, however they are written."""
    found = []
    for text in texts:
        with contextlib.suppress(ValueError):
            found.append(uuid.UUID(text))
    return found


def _globbed(pattern: str, dialect: str) -> ColumnElement[bool]:
    if not set(pattern) & set("*?"):
        return events.c.model == pattern
    if dialect == "sqlite":
        # Its LIKE takes A for a.
        return events.c.model.op("GLOB", is_comparison=True)(pattern.replace("[", "[[]"))
    escaped = "".join(_LIKE.get(character, character) for character in pattern)
    return events.c.model.like(escaped, escape="\\")
