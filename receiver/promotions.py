"""Promotion: a person decides that the body of a conflicting webhook is the true one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID

import structlog

from receiver.core.lane_names import MEDIA_LANE, REPLAY_LANE, Wake, wake_no_lane
from receiver.core.output_files import FileRules
from receiver.core.payload import Generation, parse
from receiver.core.routing import RoutingFacts
from receiver.db import job_events, outbox, promotions, pruning, replays
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.promotions import CurrentEvent, KeptReceipt, KnownFile
from receiver.db.receipts import FIRST_SEQ
from receiver.db.rows import NewEvent, NewMedia
from receiver.db.selection import Selection
from receiver.errors import RequestError, UnrecognizedBody
from receiver.ingest import make_event
from receiver.price import Credits
from receiver.replays import ReplayRequest, Replays

MAX_REASON_LENGTH: Final = 1000
"""The longest reason of a replay."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Promoted:
    """The result of a promotion, or of its dry run."""

    event_id: UUID
    request_id: str
    receipt: int
    """The receipt whose body is the event's now."""
    former_receipt: int | None
    """The receipt that keeps the former body; null in a dry run."""
    status_before: str
    status: str
    cost: Credits | None
    """The price that the new body names."""
    files_kept: int
    """Files of the former body that the new one names, too."""
    files_added: int
    files_superseded: int
    """Files that only the former body names: they stay in the storage, but in no message."""
    deliveries_canceled: int
    """Deliveries of the former body that were pending or dead."""
    destinations: list[str]
    """The destinations that get the new body."""
    replay_id: UUID | None
    """The replay that sends it; null in a dry run, and if no destination is configured."""


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The files of the new body beside those that are known."""

    added: list[NewMedia] = field(default_factory=list)
    kept: list[tuple[KnownFile, NewMedia]] = field(default_factory=list)
    superseded: list[UUID] = field(default_factory=list)


class Promotions:
    """Carries out promotions, each in one transaction: it is done as a whole, or not at all."""

    def __init__(
        self,
        database: Database,
        replays: Replays,
        *,
        rules: Callable[[], FileRules],
        wake: Wake = wake_no_lane,
    ) -> None:
        """`replays` orders the messages; `rules` returns those that say which files are downloaded."""
        self._database = database
        self._replays = replays
        self._rules = rules
        self._wake = wake

    async def promote(
        self, key: str, receipt_seq: int, *, by: str, reason: str | None, dry_run: bool = False
    ) -> Promoted | None:
        """Make the body of a receipt the body of its event, and send it to all destinations.

        `key` is the event's id or `request_id`; None is returned if there is no such event or receipt. Raises
        RequestError if the receipt has no other body, or if work on the event is under way, and
        DatabaseUnavailable.
        """
        async with self._database.write() as connection:
            event = await _lock(connection, key)
            receipt = event and await _find_receipt(connection, event, receipt_seq)
            if event is None or receipt is None:
                return None
            new, generation = await _check(connection, event, receipt)
            files = self._list_files(await promotions.list_files(connection, event.seq), generation)
            done = await self._describe(connection, event, receipt, generation, files)
            if dry_run:
                return done
            words = f"{by} promoted the receipt {receipt.seq}" + (f": {reason}" if reason else "")
            await promotions.supersede_deliveries(connection, event.seq, text=f"superseded: {words}")
            former = await promotions.exchange_bodies(connection, event, receipt, new)
            await _change_files(connection, event.seq, files)
            await job_events.revise_job(connection, event.source, generation)
            replay_id = await self._order(connection, event, by=by, reason=words)
            done = replace(done, former_receipt=former, replay_id=replay_id)
        self._wake(MEDIA_LANE)
        self._wake(REPLAY_LANE)
        log.warning("receipt promoted", event_id=str(event.id), receipt=receipt.seq, former=former, by=by)
        return done

    async def _describe(
        self,
        connection: SqlConnection,
        event: CurrentEvent,
        receipt: KeptReceipt,
        generation: Generation,
        files: _Files,
    ) -> Promoted:
        """Return the result, before anything was done."""
        job = await promotions.find_job(connection, event.seq)
        facts = RoutingFacts(
            status=generation.status,
            model=generation.model,
            source=event.source,
            caller=job.caller if job else None,
            metadata=job.metadata if job else {},
        )
        return Promoted(
            event_id=event.id,
            request_id=event.request_id,
            receipt=receipt.seq,
            former_receipt=None,
            status_before=event.status,
            status=generation.status,
            cost=generation.cost,
            files_kept=len(files.kept),
            files_added=len(files.added),
            files_superseded=len(files.superseded),
            deliveries_canceled=await promotions.count_unsent(connection, event.seq),
            destinations=self._replays.find_destinations(facts),
            replay_id=None,
        )

    def _list_files(self, known: Sequence[KnownFile], generation: Generation) -> _Files:
        """Compare the files of the new body with the known ones.

        A file is known by its URL. New files get positions behind all known ones, because storage keys have
        the position: a file of the new body must not replace the object of another one.
        """
        files = _Files()
        by_url = {(row.url, row.variant, row.kind): row for row in known}
        first = 1 + max((row.position for row in known), default=-1)
        for ref in generation.list_files(self._rules()).files:
            row = by_url.pop((ref.url, ref.variant, ref.kind), None)
            if row is not None:
                files.kept.append((row, NewMedia.of(ref)))
            else:
                files.added.append(NewMedia.of(replace(ref, position=first + ref.position)))
        files.superseded.extend(row.id for row in by_url.values() if row.state != "superseded")
        return files

    async def _order(
        self, connection: SqlConnection, event: CurrentEvent, *, by: str, reason: str
    ) -> UUID | None:
        """Order the replay of the event, which sends it as soon as its files are stored."""
        if not self._replays.destinations:
            return None
        request = ReplayRequest(selection=Selection(ids=(str(event.id),)), reason=reason[:MAX_REASON_LENGTH])
        order = self._replays.make_order(request, key=None, caller=by)
        scope = replays.Scope(after_seq=event.seq - 1, until_seq=event.seq)
        await replays.insert_order(connection, order, scope, matched=1)
        return order.id


async def _lock(connection: SqlConnection, key: str) -> CurrentEvent | None:
    # PostgreSQL rejects NUL in a text parameter.
    found = [] if "\0" in key else await pruning.find_events(connection, key)
    if len(found) > 1:
        text = "events of several sources have this request_id: give the id of one of them"
        raise RequestError(text, code="ambiguous")
    return await promotions.lock_event(connection, found[0].seq) if found else None


async def _find_receipt(connection: SqlConnection, event: CurrentEvent, seq: int) -> KeptReceipt | None:
    if seq == FIRST_SEQ and event.secret_id is not None:
        raise _not_promotable("its body is the event's already")
    return await promotions.find_receipt(connection, event.seq, seq)


async def _check(
    connection: SqlConnection, event: CurrentEvent, receipt: KeptReceipt
) -> tuple[NewEvent, Generation]:
    """Return the event and the generation that the body of a receipt makes. Raises RequestError."""
    if event.state in ("erased", "unrecognized"):
        raise _not_promotable(f"the event is {event.state}")
    if receipt.outcome == "promoted" or receipt.body_sha256 == event.body_sha256:
        raise _not_promotable("its body is the event's already")
    if receipt.body is None:
        raise _not_promotable(f"a receipt with the outcome {receipt.outcome} has no body of its own")
    new = make_event(
        event.source, receipt.body, received_at=receipt.received_at.timestamp(), origin=receipt.origin
    )
    try:
        generation = parse(receipt.body)
    except UnrecognizedBody as error:
        raise _not_promotable(f"this release does not recognize its body ({error.reason})") from None
    if new.id != event.id:
        raise _not_promotable("its body has another request_id")
    if event.state == "received":
        raise RequestError("the event waits for its fan-out: try again in a moment", code="not_settled")
    if busy := await promotions.find_under_way(connection, event.seq):
        text = f"the event is being sent to {', '.join(busy)}: try again in a moment"
        raise RequestError(text, code="not_settled")
    return new, generation


def _not_promotable(reason: str) -> RequestError:
    return RequestError(f"the receipt cannot be promoted: {reason}", code="not_promotable")


async def _change_files(connection: SqlConnection, seq: int, files: _Files) -> None:
    await promotions.supersede_files(connection, files.superseded)
    for known, file in files.kept:
        if known.state == "superseded":
            await promotions.restore_file(connection, known, file)
    await promotions.set_fields(connection, [(known.id, file.field) for known, file in files.kept])
    await outbox.insert_media(connection, [(seq, file) for file in files.added])
    await promotions.set_state_by_files(connection, seq)
