"""Logs and metrics.

Logs are one JSON object per line, or readable lines where standard error is a terminal. A record is a short
message with a stable `event` key and ids as fields. Writing never blocks the service: records pass through a
bounded queue, and what does not fit is dropped and counted (a reader that stopped must not stop webhooks).
"""

import asyncio
import atexit
import logging
import logging.handlers
import queue
import sys
import threading
import traceback
from collections.abc import MutableMapping
from typing import Any, Final

import orjson
import structlog

from receiver.errors import ReceiverError
from receiver.masking import mask
from receiver.metrics import LOGS_DROPPED

FIELD_LIMIT: Final = 2048
"""Characters of one field that reach the log; payloads may quote whatever a provider or caller wrote."""
EXCEPTION_LIMIT: Final = 500
"""Characters of a library's exception text in a traceback."""
MOST_EXCEPTIONS: Final = 20
"""Exceptions of a chain in a traceback."""
_QUOTING: Final = ("error", "problem")
QUEUE_LIMIT: Final = 10_000
WRITING_DELAY: Final = 0.05
"""Seconds for which a record may wait for others to be written with it."""

_Event = MutableMapping[str, Any]


class _DroppingQueueHandler(logging.handlers.QueueHandler):
    """Counts what does not fit instead of blocking or printing a traceback."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The library's would flatten structlog's event dict into text.
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            LOGS_DROPPED.inc()


class _UnhurriedListener(logging.handlers.QueueListener):
    """Writes what has come within a moment at once.

    Each time that its thread wakes up the event loop has to wait for the interpreter, and every group of
    webhooks makes a record: hundreds a second.
    """

    def __init__(self, records: "queue.Queue[logging.LogRecord]", handler: logging.Handler) -> None:
        super().__init__(records, handler)
        self._records = records
        self._hurry = threading.Event()

    async def write_all(self) -> None:
        """Write what there is, for a second at most; what comes later does not wait for more."""
        self._hurry.set()
        for _ in range(200):
            if not self._records.unfinished_tasks:
                break
            await asyncio.sleep(0.005)

    def dequeue(self, block: bool) -> logging.LogRecord:  # noqa: FBT001 - the library's signature
        try:
            return super().dequeue(False)  # noqa: FBT003 - likewise
        except queue.Empty:
            record = super().dequeue(block)
            self._hurry.wait(WRITING_DELAY)
            return record


def _limit_fields(_logger: Any, _method: str, event: _Event) -> _Event:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > FIELD_LIMIT:
            # What went wrong stands at the end of a traceback.
            last = key == "exception"
            event[key] = f"…{value[-FIELD_LIMIT:]}" if last else f"{value[:FIELD_LIMIT]}…"
    return event


def _escape_controls(_logger: Any, _method: str, event: _Event) -> _Event:
    """Escape what a terminal would act on: a payload may carry control characters. JSON needs no help."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            # The traceback is ours and needs its line ends.
            event[key] = value if key == "exception" else value.encode("unicode_escape").decode("ascii")
    return event


def _mask_quoted(_logger: Any, _method: str, event: _Event) -> _Event:
    """Mask secrets in the fields that may quote others, should a message of ours have done so unmasked."""
    for key in _QUOTING:
        if isinstance(value := event.get(key), str):
            event[key] = mask(value)
    return event


def _mask_event(_logger: Any, _method: str, event: _Event) -> _Event:
    """Mask secrets in a library's record: its message is the library's own."""
    event["event"] = mask(str(event["event"]))
    return event


def _format_exception(exc_info: Any) -> str:
    """Return a traceback with our exceptions' messages, and with those of libraries masked and cut.

    Without locals, which hold bodies and secrets.
    """
    parts: list[str] = []
    error: BaseException | None = exc_info[1]
    for _ in range(MOST_EXCEPTIONS):
        if error is None:
            break
        text = str(error) if isinstance(error, ReceiverError) else mask(str(error))[:EXCEPTION_LIMIT]
        frames = "".join(traceback.format_tb(error.__traceback__))
        members = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        inside = "".join(f"\n\nin it:\n\n{_format_exception((None, each, None))}" for each in members[:3])
        parts.append(f"Traceback:\n{frames}{type(error).__qualname__}: {text}{inside}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))


_exceptions: Final = structlog.processors.ExceptionRenderer(_format_exception)


def _dumps(event: Any, **_: Any) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


_listeners: list[_UnhurriedListener] = []


async def write_logs() -> None:
    """Write what was logged; for a process that ends by a signal, and has no later moment for it."""
    for listener in _listeners:
        await listener.write_all()


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
    renderer: list[structlog.typing.Processor] = (
        [_escape_controls, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
        if sys.stderr.isatty()
        else [structlog.processors.JSONRenderer(serializer=_dumps)]
    )
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
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
            foreign_pre_chain=[*shared, _mask_event],
        )
    )
    records: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE_LIMIT)
    handler = _DroppingQueueHandler(records)
    listener = _UnhurriedListener(records, stream)
    listener.start()
    atexit.register(listener.stop)
    _listeners.append(listener)

    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # One record per webhook is ours; httpx's would carry the URLs of signed media.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # These tell of every statement and its values, and of every header.
    for name in ("aiosqlite", "httpcore", "botocore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # And these, at any level, of messages and logins; what fails is told by who uses them.
    for name in ("aiormq", "aiokafka", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def configure_library_logging() -> None:
    """Send our logs to the `logging` of the program that has us for a library, which decides what is shown.

    A program that has configured structlog itself keeps its own ways.
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
