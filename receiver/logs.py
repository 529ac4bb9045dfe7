"""Logs: one JSON object per line, or readable lines if standard error is a terminal.

A record is a short message under the stable key `event`, with ids as fields. Logging never blocks the
service: records go through a bounded queue to a thread that writes them. If the reader of standard error
stops, the queue fills, and further records are dropped and counted.
"""

import asyncio
import atexit
import contextlib
import logging
import logging.handlers
import queue
import sys
import threading
import traceback
from collections.abc import MutableMapping, Sequence
from typing import Any, Final

import orjson
import structlog

from receiver.errors import ReceiverError
from receiver.masking import mask
from receiver.metrics import LOGS_DROPPED

MAX_FIELD_CHARACTERS: Final = 2048
"""Longer fields are cut: a payload may quote a text of any length."""
MAX_EXCEPTION_CHARACTERS: Final = 500
"""The longest text of a library's exception in a traceback."""
MAX_EXCEPTIONS: Final = 20
"""The most exceptions of one chain in a traceback."""
MAX_QUEUED_RECORDS: Final = 10_000
WRITE_DELAY_SECONDS: Final = 0.05
"""The longest time that a record waits for others, to be written with them."""

_QUOTING: Final = ("error", "problem")
"""Fields that may quote a peer's text."""

_Event = MutableMapping[str, Any]


class _DroppingQueueHandler(logging.handlers.QueueHandler):
    """Drops and counts records while the queue is full, in place of blocking or printing a traceback."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The library's method would format the record to text too early, and lose structlog's fields. Another
        # thread formats the record of a library, so the fields that are bound to this task go along.
        if not isinstance(record.msg, dict):
            record.bound = structlog.contextvars.get_contextvars()
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            LOGS_DROPPED.inc()


class _BatchingListener(logging.handlers.QueueListener):
    """Writes the records of up to WRITE_DELAY_SECONDS together.

    Each wake-up of the writing thread takes the GIL from the event loop, and each batch of webhooks makes a
    record: hundreds per second. So the thread wakes up 20 times per second at most.
    """

    def __init__(self, records: "queue.Queue[logging.LogRecord]", handler: logging.Handler) -> None:
        super().__init__(records, handler)
        self._records = records
        self._flushing = threading.Event()

    async def flush(self) -> None:
        """Wait for a second at most until the queue is empty; later records are written without delay."""
        self._flushing.set()
        for _ in range(200):
            if not self._records.unfinished_tasks:
                break
            await asyncio.sleep(0.005)

    def handle(self, record: logging.LogRecord) -> None:
        # If standard error is closed, `logging` fails to report that on it, and the thread would end.
        with contextlib.suppress(ValueError):
            super().handle(record)

    def dequeue(self, block: bool) -> logging.LogRecord:  # noqa: FBT001 - the library's signature
        try:
            return super().dequeue(block=False)
        except queue.Empty:
            record = super().dequeue(block)
            self._flushing.wait(WRITE_DELAY_SECONDS)
            return record


def _add_bound(_logger: Any, _method: str, event: _Event) -> _Event:
    """Add the fields that were bound to the task of a library's record."""
    event.update(getattr(event["_record"], "bound", {}))
    return event


def _limit_fields(_logger: Any, _method: str, event: _Event) -> _Event:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > MAX_FIELD_CHARACTERS:
            # The failure is at the end of a traceback.
            last = key == "exception"
            event[key] = f"…{value[-MAX_FIELD_CHARACTERS:]}" if last else f"{value[:MAX_FIELD_CHARACTERS]}…"
    return event


def _escape_controls(_logger: Any, _method: str, event: _Event) -> _Event:
    """Escape a payload's control characters, which a terminal would obey; the JSON format does so itself."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            # A traceback is our own text and keeps its line feeds.
            event[key] = value if key == "exception" else value.encode("unicode_escape").decode("ascii")
    return event


def _mask_quoted(_logger: Any, _method: str, event: _Event) -> _Event:
    """Mask secrets in the fields that quote peers, in case the code that made the message did not."""
    for key in _QUOTING:
        if isinstance(value := event.get(key), str):
            event[key] = mask(value)
    return event


def _mask_event(_logger: Any, _method: str, event: _Event) -> _Event:
    """Mask secrets in a library's message."""
    event["event"] = mask(str(event["event"]))
    return event


def _format_exception(exc_info: Any) -> str:
    """Return a traceback; the texts of libraries' exceptions are masked and cut.

    Local variables are left out: they contain bodies and secrets.
    """
    parts: list[str] = []
    error: BaseException | None = exc_info[1]
    for _ in range(MAX_EXCEPTIONS):
        if error is None:
            break
        text = str(error) if isinstance(error, ReceiverError) else mask(str(error))[:MAX_EXCEPTION_CHARACTERS]
        frames = "".join(traceback.format_tb(error.__traceback__))
        members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        inside = "".join(f"\n\ncontains:\n\n{_format_exception((None, each, None))}" for each in members[:3])
        parts.append(f"Traceback:\n{frames}{type(error).__qualname__}: {text}{inside}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))


_exceptions: Final = structlog.processors.ExceptionRenderer(_format_exception)


def _dumps(event: Any, **_: Any) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


_listeners: list[_BatchingListener] = []


async def flush_logs() -> None:
    """Write all queued records now: a process that a signal ends has no later chance."""
    for listener in _listeners:
        await listener.flush()


def configure_logging(*, level: str = "INFO") -> None:
    """Send all logs of the process (ours, uvicorn's, libraries') to standard error."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.PositionalArgumentsFormatter(),
        _exceptions,
        _mask_quoted,
        _limit_fields,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers = [_start_writing(shared)]
    root.setLevel(level)
    _quiet_libraries()


def _start_writing(shared: Sequence[structlog.typing.Processor]) -> logging.Handler:
    """Start the thread that writes to standard error; return the handler that feeds it."""
    renderer: list[structlog.typing.Processor] = (
        [_escape_controls, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if sys.stderr.isatty()
        else [structlog.processors.JSONRenderer(serializer=_dumps)]
    )
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
            foreign_pre_chain=[_add_bound, *shared, _mask_event],
        )
    )
    records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_QUEUED_RECORDS)
    listener = _BatchingListener(records, stream)
    listener.start()
    atexit.register(listener.stop)
    _listeners.append(listener)
    return _DroppingQueueHandler(records)


def _quiet_libraries() -> None:
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # The ingest logs webhooks itself. httpx would log the URLs of signed media, and the others each step or
    # each header.
    for name in ("uvicorn.access", "httpx", "alembic", "httpcore", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # These log messages and logins at any level. Their callers report the failures.
    for name in ("aiormq", "aiokafka", "sqlalchemy", "opentelemetry", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Of OpenTelemetry, `receiver.tracing` reports the failures to export, but not a mistyped sampler.
    logging.getLogger("opentelemetry.sdk.trace.sampling").setLevel(logging.WARNING)


def configure_library_logging() -> None:
    """Send our logs to `logging`, for programs that use the package as a library and choose what is shown.

    If the program has configured structlog itself, nothing is changed.
    """
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            _exceptions,
            _mask_quoted,
            _limit_fields,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
