"""Logs: never in the way, never a terminal's command, never endless."""

import logging
import queue

from prometheus_client import REGISTRY

from receiver.observability import FIELD_LIMIT, _DroppingQueueHandler, _escape_controls, _limit_fields


def dropped() -> float:
    """Return how many records were dropped so far."""
    return REGISTRY.get_sample_value("receiver_log_records_dropped_total") or 0.0


def test_a_full_queue_drops_and_counts() -> None:
    """G10: a log that nobody reads costs records, not the service: writing never blocks."""
    records: queue.Queue[logging.LogRecord] = queue.Queue(2)
    handler = _DroppingQueueHandler(records)
    before = dropped()
    for number in range(5):
        handler.emit(logging.LogRecord("x", logging.INFO, "x", number, "message", None, None))
    assert records.qsize() == 2
    assert dropped() == before + 3


def test_fields_are_cut() -> None:
    """G7: what a provider or caller wrote cannot fill the disk with one record."""
    event = _limit_fields(None, "info", {"event": "x", "error": "e" * 10_000, "count": 1})
    assert event == {"event": "x", "error": "e" * FIELD_LIMIT + "…", "count": 1}


def test_terminals_get_no_control_characters() -> None:
    """G7: escape sequences in a payload do nothing to whoever watches; our own tracebacks stay readable."""
    event = _escape_controls(
        None, "info", {"error": "\x1b[31mred\r\nFAKE", "exception": "a\nb", "ok": "é ok"}
    )
    assert event == {"error": "\\x1b[31mred\\r\\nFAKE", "exception": "a\nb", "ok": "é ok"}
