"""The record of operators' actions, as the guard of the endpoints writes it."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog

from receiver.db import audit
from receiver.db.database import Database
from receiver.error_texts import error_text
from receiver.masking import mask

MAX_TARGET_LENGTH: Final = 255
MAX_CODE_LENGTH: Final = 63
"""Codes of Clipia's errors may be longer."""
MAX_RUNS: Final = 1000
"""Runs whose parts are known; a part of an older run gets a record of its own."""

log = structlog.get_logger()


@dataclass(kw_only=True)
class Record:
    """Facts of an action that its query or its body tells."""

    reason: str | None = None
    dry_run: bool = False
    is_part: bool = False
    """Whether it goes on with an earlier call of the same action, which is on record."""
    run: tuple[object, ...] | None = None
    """The facts that all parts of a run share, except for author, operation, reason and `dry_run`."""

    def note(self, values: object) -> None:
        """Take the facts from a query or a body, if it has them."""
        self.reason = readable(getattr(values, "reason", None)) or self.reason
        self.dry_run = getattr(values, "dry_run", False) is True or self.dry_run
        self.is_part = getattr(values, "is_part", False) is True or self.is_part

    def note_run(self, *facts: object) -> None:
        """Take the facts that all parts of this run share."""
        # A time from the database and the same one from a body have different texts.
        self.run = tuple(each.timestamp() if isinstance(each, datetime) else each for each in facts)


class ActionLog:
    """Writes the record. It knows the runs of this process: a part in another process has its own record."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._runs: OrderedDict[bytes, int] = OrderedDict()

    async def begin(self, record: Record, *, by: str, operation: str, target: str) -> int:
        """Record that an action is about to begin; return its id. Raises DatabaseUnavailable."""
        async with self._database.write() as connection:
            return await audit.begin(
                connection,
                by=by,
                operation=operation,
                target=(readable(target) or "")[:MAX_TARGET_LENGTH] or None,
                reason=record.reason,
                dry_run=record.dry_run,
            )

    async def end(
        self, action_id: int, record: Record, *, by: str, operation: str, status: int, code: str | None
    ) -> None:
        """Record the outcome. A part that succeeded keeps no record of its own: a run may have thousands.

        It raises nothing: the action is done, and its answer must say so.
        """
        values = {"status": status, "code": _cut(code), "reason": record.reason, "dry_run": record.dry_run}
        facts = (by, operation, record.reason, record.dry_run, record.run)
        run = hashlib.sha256(repr(facts).encode(errors="replace")).digest()
        begun = self._runs.get(run) if record.is_part and record.run is not None and code is None else None
        try:
            async with self._database.write() as connection:
                if begun is not None and await audit.merge(connection, action_id, begun=begun):
                    return
                await audit.end(connection, action_id, values)
        except Exception as error:  # noqa: BLE001 - the answer matters more than its record
            log.warning(
                "outcome of an action not recorded",
                action=action_id,
                status=status,
                error=error_text(error),
            )
            return
        if code is None and record.run is not None:
            self._runs[run] = action_id
            if len(self._runs) > MAX_RUNS:
                self._runs.popitem(last=False)


def _cut(code: str | None) -> str | None:
    return None if code is None else (readable(code) or "")[:MAX_CODE_LENGTH]


def readable(text: str | None) -> str | None:
    """Return a text without secrets and control characters; None if nothing is left."""
    return "".join(each if each.isprintable() else " " for each in mask(text or "")).strip() or None
