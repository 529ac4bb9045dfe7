"""Logs: they never block the service, control a terminal, or fill the disk."""

import io
import json
import logging
import queue
import subprocess
import sys
import time

import pytest
from prometheus_client import REGISTRY

from receiver.logs import (
    MAX_FIELD_CHARACTERS,
    WRITE_DELAY_SECONDS,
    _BatchingListener,
    _DroppingQueueHandler,
    _escape_controls,
    _limit_fields,
)


def dropped() -> float:
    """Return how many records were dropped so far."""
    return REGISTRY.get_sample_value("receiver_log_records_dropped_total") or 0.0


def test_a_full_queue_drops_and_counts() -> None:
    """G10: if the log has no reader, records are dropped, and the service goes on: logging never blocks."""
    records: queue.Queue[logging.LogRecord] = queue.Queue(2)
    handler = _DroppingQueueHandler(records)
    before = dropped()
    for number in range(5):
        handler.emit(logging.LogRecord("x", logging.INFO, "x", number, "message", None, None))
    assert records.qsize() == 2
    assert dropped() == before + 3


def test_records_are_written_together_and_none_is_lost() -> None:
    """G10: the writing thread wakes up rarely, and writes all records at the end of the process."""

    class Records(queue.Queue[logging.LogRecord]):
        waits = 0

        def get(self, block: bool = True, timeout: float | None = None) -> logging.LogRecord:  # noqa: FBT001, FBT002
            self.waits += block
            return super().get(block, timeout)

    class Written(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.numbers: list[int] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.numbers.append(record.lineno)

    records, written = Records(), Written()
    listener = _BatchingListener(records, written)
    handler, began = _DroppingQueueHandler(records), time.monotonic()
    listener.start()
    for number in range(100):
        handler.emit(logging.LogRecord("x", logging.INFO, "x", number, "message", None, None))
        time.sleep(0.001)
    listener.stop()
    assert written.numbers == list(range(100))
    assert records.waits <= (time.monotonic() - began) / WRITE_DELAY_SECONDS + 2


def test_a_closed_stream_does_not_end_the_writing_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: if standard error is closed, the record is lost, and the thread takes the next one."""

    class Handler(logging.StreamHandler[io.StringIO]):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                super().emit(record)
            finally:
                if self.stream.closed:
                    self.stream = io.StringIO()

    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    records: queue.Queue[logging.LogRecord] = queue.Queue()
    written = Handler(closed)
    listener = _BatchingListener(records, written)
    for message in ("lost", "written"):
        records.put(logging.LogRecord("x", logging.INFO, "x", 1, message, None, None))
    listener.start()
    listener.stop()
    assert written.stream.getvalue() == "written\n"


def test_fields_are_cut() -> None:
    """G7: a long text of a provider or a caller cannot fill the disk with one record."""
    event = _limit_fields(None, "info", {"event": "x", "error": "e" * 10_000, "count": 1})
    assert event == {"event": "x", "error": "e" * MAX_FIELD_CHARACTERS + "…", "count": 1}


def test_terminals_get_no_control_characters() -> None:
    """G7: escape sequences in a payload have no effect on a terminal; our own tracebacks stay readable."""
    event = _escape_controls(
        None, "info", {"error": "\x1b[31mred\r\nFAKE", "exception": "a\nb", "ok": "é ok"}
    )
    assert event == {"error": "\\x1b[31mred\\r\\nFAKE", "exception": "a\nb", "ok": "é ok"}


def test_records_of_libraries_have_the_bound_fields() -> None:
    """A traceback that the server logs has the id of its request, although another thread writes it."""
    program = """if True:
        import logging
        from structlog.contextvars import bind_contextvars, unbind_contextvars
        from receiver.logs import configure_logging

        configure_logging()
        bind_contextvars(x_request_id="first")
        logging.getLogger("uvicorn.error").error("failed")
        unbind_contextvars("x_request_id")
        logging.getLogger("uvicorn.error").error("later")
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    first, later = (json.loads(line) for line in run.stderr.splitlines())
    assert (first["event"], first["x_request_id"]) == ("failed", "first")
    assert "x_request_id" not in later
    assert not {"bound", "_record"} & first.keys()
