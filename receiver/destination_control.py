"""Destinations as an operator handles them: list, pause, resume, test."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final

import structlog
from cloudevents.core.v1.event import CloudEvent
from structlog.typing import EventDict, WrappedLogger

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.core.lane_names import DESTINATION_STATES, Wake
from receiver.core.routing import filter_text
from receiver.db import destinations
from receiver.db.database import Database
from receiver.destination_settings import DestinationSettings
from receiver.destinations import Destination, open_destination
from receiver.error_texts import error_text
from receiver.errors import RequestError
from receiver.lanes.backlog import read_backlog
from receiver.status import DestinationStatus, read_destinations

TEST_SECONDS: Final = 30.0
"""How long a test of a destination may take."""
CLOSE_SECONDS: Final = 5.0
TEST_TYPE: Final = "ai.clipia.receiver.test"
"""The type of the message of a test. It is public."""

_problems: ContextVar[list[str] | None] = ContextVar("problems", default=None)


class ListedDestination(DestinationStatus):
    """A destination with its settings, and with the next command if it needs one."""

    kind: str | None
    """The scheme of its URL; null if it is not configured."""
    when: str | None
    """`received` or `media_stored`; null if it gets no events."""
    gets: str | None
    """Its filter in words, and whether it gets alerts."""
    command: str | None


class DestinationTest(TypedDict):
    """The result of a test."""

    name: str
    reachable: bool
    seconds: float
    """The time that the test took."""
    error: str | None
    warnings: list[str]
    """Settings with which the destination may lose events."""
    event_id: str | None
    """The id of the message that it has confirmed."""


class DestinationControl:
    """Reads and changes destinations. All methods raise DatabaseUnavailable."""

    def __init__(
        self, database: Database, configured: Callable[[], Sequence[DestinationSettings]], *, wake: Wake
    ) -> None:
        """Keep `configured`, which returns the destinations of the current settings."""
        self._database = database
        self._configured = configured
        self._wake = wake

    async def list_all(self) -> list[ListedDestination]:
        """Return all destinations: configured, paused, or with deliveries."""
        return [self._listed(each) for each in await self._read()]

    async def pause(self, name: str, *, by: str, reason: str | None) -> ListedDestination:
        """Pause a destination. Raises RequestError if it is not configured, or gets no events."""
        if self.require(name).alerts == "only":
            message = f"{name} gets alerts alone, which no pause stops: remove it from the settings"
            raise RequestError(message, code="invalid_request")
        async with self._database.write() as connection:
            await destinations.pause(connection, name, by=by, reason=reason)
        self._wake(DESTINATION_STATES)
        return await self._show(name)

    async def resume(self, name: str) -> ListedDestination:
        """End the pause of a destination. Raises RequestError if it is neither configured nor paused."""
        async with self._database.write() as connection:
            if not await destinations.resume(connection, name):
                self.require(name)
        self._wake(DESTINATION_STATES)
        return await self._show(name)

    async def test(self, name: str, *, send: bool) -> DestinationTest:
        """Check a destination from this process; with `send` also publish a message, to be confirmed.

        A pause does not matter. Raises RequestError if it is not configured.
        """
        settings = self.require(name)
        event, began = _test_event(name) if send else None, time.monotonic()
        warnings, error = await _test(settings, event)
        seconds = round(time.monotonic() - began, 3)
        event_id = None if error or event is None else str(event.get_id())
        return DestinationTest(
            name=name,
            reachable=error is None,
            seconds=seconds,
            error=error,
            warnings=warnings,
            event_id=event_id,
        )

    def require(self, name: str) -> DestinationSettings:
        """Return the settings of a destination. Raises RequestError if it is not configured."""
        configured = {each.name: each for each in self._configured()}
        if name not in configured:
            known = ", ".join(configured) or "none"
            raise RequestError(f"there is no such destination; configured: {known}", code="not_found")
        return configured[name]

    async def _read(self, *also: str) -> list[DestinationStatus]:
        backlog = await read_backlog(self._database, self._configured())
        async with self._database.read() as connection:
            return await read_destinations(connection, self._configured(), backlog, *also)

    async def _show(self, name: str) -> ListedDestination:
        return next(self._listed(each) for each in await self._read(name) if each["name"] == name)

    def _listed(self, each: DestinationStatus) -> ListedDestination:
        found = next((one for one in self._configured() if one.name == each["name"]), None)
        return ListedDestination(
            **each,
            kind=None if found is None else found.url.get_secret_value().partition(":")[0].lower(),
            when=None if found is None or found.alerts == "only" else found.when,
            gets=None if found is None else content_text(found),
            command=_next_command(each),
        )


def content_text(settings: DestinationSettings) -> str:
    """Return the messages of a destination in words."""
    if settings.alerts == "only":
        return "alerts alone"
    selected = filter_text(settings.filter) or "every event"
    return f"{selected}, and alerts" if settings.alerts else selected


def _next_command(each: DestinationStatus) -> str | None:
    """Return the command that a destination needs next, if it needs one."""
    name = each["name"]
    if each["pause"] is not None:
        return f"receiver destinations resume {name}"
    if not each["configured"] and (each["pending"] or each["dead"]):
        return f"receiver deliveries move {name} NEW{'' if each['pending'] else ' --dead'}"
    if each["circuit"] is not None:
        return f"receiver destinations test {name}"
    if each["dead"]:
        return f"receiver deliveries list --destination {name} --state dead"
    return None


def _test_event(name: str) -> CloudEvent:
    return CloudEvent(
        attributes={
            "specversion": "1.0",
            "id": str(uuid.uuid4()),
            "source": "/receiver",
            "type": TEST_TYPE,
            "subject": name,
            "time": datetime.now(UTC),
            "datacontenttype": "application/json",
            "deliveryid": str(uuid.uuid4()),
            "attempt": 1,
        },
        data={"destination": name},
    )


async def _test(settings: DestinationSettings, event: CloudEvent | None) -> tuple[list[str], str | None]:
    """Return the warnings and the error of a test; without an error the event is confirmed."""
    warnings: list[str] = []
    try:
        destination = open_destination(settings)
        try:
            async with asyncio.timeout(TEST_SECONDS):
                warnings = await check_destination(destination)
                if event is not None:
                    await destination.publish(event)
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await destination.close()
    except TimeoutError:
        return warnings, f"no answer within {TEST_SECONDS:.0f} s"
    except Exception as error:  # noqa: BLE001 - the error is the result
        return warnings, error_text(error)
    return warnings, None


async def check_destination(destination: Destination) -> list[str]:
    """Open and check a destination; return the settings with which it may lose events.

    Raises SettingsError or PublishFailed.
    """
    with collected_problems() as problems:
        await destination.start()
        await destination.check()
    return problems


@contextmanager
def collected_problems() -> Iterator[list[str]]:
    """Collect the problems that destinations log inside the block, instead of logging them.

    Those of other tasks are logged.
    """
    problems: list[str] = []

    def collect(_logger: WrappedLogger, _method: str, entry: EventDict) -> EventDict:
        if "problem" not in entry or _problems.get() is not problems:
            return entry
        # `start` and `check` may find the same problem.
        if entry["problem"] not in problems:
            problems.append(entry["problem"])
        raise structlog.DropEvent

    # Loggers keep a reference to this list from their first line on, so a new list would not reach them.
    processors = structlog.get_config()["processors"]
    processors.insert(0, collect)
    token = _problems.set(problems)
    try:
        yield problems
    finally:
        _problems.reset(token)
        processors.remove(collect)
