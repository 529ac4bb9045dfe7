"""Logs: a traceback and a library's record show no secret."""

import json
import logging
from typing import Any

import httpx
import pytest
import structlog

from receiver.errors import PublishFailed
from receiver.lanes import describe
from receiver.masking import MASK, hold
from receiver.observability import _exceptions, _mask_event, _mask_quoted

SECRET = "cAnArY8f3b61d2e9"


def logged(error: BaseException) -> str:
    """Return the traceback as it is logged."""
    return str(_exceptions(None, "error", {"event": "x", "exc_info": error})["exception"])


def test_a_traceback_masks_the_words_of_libraries() -> None:
    """G8: frames and classes are told, a library's text only masked and cut, along the whole chain."""
    hold(SECRET)

    def refuse() -> None:
        raise httpx.LocalProtocolError(f"Illegal header value b'Bearer {SECRET}\\n'")

    def fail() -> None:
        try:
            refuse()
        except httpx.LocalProtocolError as error:
            raise ValueError("x" * 10_000) from error

    with pytest.raises(ValueError, match="xxx") as caught:
        fail()
    text = logged(caught.value)
    assert SECRET not in text
    assert f"LocalProtocolError: Illegal header value b'Bearer {MASK}" in text
    assert "which led to:" in text
    assert "in fail\n" in text
    assert len(text) < 5_000


def test_a_group_s_members_are_in_its_traceback() -> None:
    """G8: what failed in a task group is told, masked like everything else."""
    hold(SECRET)
    text = logged(ExceptionGroup("two", [ValueError(SECRET), PublishFailed("our own words", reason="x")]))
    assert "ExceptionGroup: two" in text
    assert f"ValueError: {MASK}" in text
    assert "PublishFailed: our own words" in text


def test_an_endless_chain_ends() -> None:
    """A circle of causes is cut."""
    error = ValueError("a")
    error.__cause__ = ValueError("b")
    error.__cause__.__cause__ = error
    assert "ValueError: a" in logged(error)


def test_records_of_libraries_are_masked() -> None:
    """G8: asyncio puts the exception's repr into its own message."""
    hold(SECRET)
    event: dict[str, Any] = {"event": f"Task exception was never retrieved: ValueError('{SECRET}')"}
    assert SECRET not in json.dumps(dict(_mask_event(logging.getLogger(), "error", event)))


def test_fields_that_quote_are_masked() -> None:
    """G8: a field that holds an error is masked once more."""
    hold(SECRET)
    event: dict[str, Any] = {"event": "x", "error": SECRET, "problem": SECRET, "count": 3}
    assert _mask_quoted(structlog.get_logger(), "error", event) == {
        "event": "x",
        "error": MASK,
        "problem": MASK,
        "count": 3,
    }


def test_an_unexpected_error_goes_on_record_by_its_class() -> None:
    """G8: rows are shown to callers; a library's text stays in the log."""
    assert describe(ValueError(SECRET)) == "ValueError, see the log"
    assert describe(PublishFailed("our own words", reason="x")) == "PublishFailed: our own words"
