"""The retry policies, as a table."""

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.core.retry import (
    DAY,
    MAX_RETRY_AFTER_SECONDS,
    MEDIA,
    MEDIA_MISSING,
    STORAGE,
    RetryPolicy,
    media_policy,
    parse_retry_after,
    refused_delay,
)
from receiver.errors import (
    MediaBlocked,
    MediaMissing,
    MediaUnavailable,
    PublishFailed,
    PublishRejected,
    StorageUnavailable,
)

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
POLICY = RetryPolicy(initial=2.0, cap=600.0, give_up_after=3 * DAY)
FAILED = PublishFailed("no confirm", reason="timeout")


@pytest.mark.parametrize(
    ("attempt", "age", "jitter", "expected"),
    [
        (1, 0.0, 0.0, 0.0),
        (1, 0.0, 0.5, 1.0),
        (2, 5.0, 0.5, 2.0),
        (5, 60.0, 0.5, 16.0),
        (10, 900.0, 0.5, 300.0),
        (1000, DAY, 0.5, 300.0),
        (100_000, DAY, 0.999, 599.4),
    ],
)
def test_delay_doubles_up_to_its_cap(attempt: int, age: float, jitter: float, expected: float) -> None:
    """E4: delays grow exponentially to the cap, scaled by the jitter."""
    assert POLICY.next_delay(FAILED, attempt=attempt, age=age, jitter=jitter) == pytest.approx(expected)


def test_gives_up_when_the_schedule_ends() -> None:
    """E4: the last attempt is on the third day."""
    assert POLICY.next_delay(FAILED, attempt=500, age=3 * DAY - 10, jitter=0.9) == pytest.approx(10)
    assert POLICY.next_delay(FAILED, attempt=501, age=3 * DAY, jitter=0.9) is None


def test_permanent_errors_are_not_retried() -> None:
    """E7: if an error is permanent, the work is given up at once."""
    for error in (PublishRejected("400", reason="status"), MediaBlocked("host", reason="host")):
        assert POLICY.next_delay(error, attempt=1, age=0, jitter=0.5) is None


def test_unexpected_errors_are_retried() -> None:
    """If we have a bug, no work is lost: the next release may succeed."""
    assert POLICY.next_delay(KeyError("x"), attempt=1, age=0, jitter=0.5) == 1.0


def test_retry_after_is_a_lower_bound() -> None:
    """E5: if the other side asks for a longer delay, it gets one, even beyond the cap."""
    busy = PublishFailed("429", reason="status", retry_after=900.0)
    assert POLICY.next_delay(busy, attempt=1, age=0, jitter=0.5) == 900.0
    soon = PublishFailed("429", reason="status", retry_after=0.5)
    assert POLICY.next_delay(soon, attempt=8, age=0, jitter=0.5) == 128.0


def test_missing_media_is_tried_three_times_over_an_hour() -> None:
    """D15: if a file is missing (404), it is given up after at least three attempts and one hour."""
    missing = MediaMissing("404", reason="status")
    assert media_policy(missing) is MEDIA_MISSING
    assert MEDIA_MISSING.next_delay(missing, attempt=2, age=4000, jitter=0.5) is not None
    assert MEDIA_MISSING.next_delay(missing, attempt=9, age=3500, jitter=0.9) == pytest.approx(100)
    assert MEDIA_MISSING.next_delay(missing, attempt=3, age=3600, jitter=0.5) is None


def test_storage_failures_never_give_a_file_up() -> None:
    """D16: if the disk is full, downloads are retried every minute without end."""
    full = StorageUnavailable("no space", reason="full")
    assert media_policy(full) is STORAGE
    assert STORAGE.next_delay(full, attempt=10_000, age=30 * DAY, jitter=0.5) == 30.0


def test_other_download_errors_have_three_days() -> None:
    """D15: if the CDN is down, downloads are retried."""
    assert media_policy(MediaUnavailable("502", reason="status")) is MEDIA


@given(
    attempt=st.integers(1, 10**9),
    age=st.floats(0, 10 * DAY),
    jitter=st.floats(0, 1, exclude_max=True),
    retry_after=st.none() | st.floats(0, 10 * DAY),
)
def test_a_delay_never_passes_the_deadline(
    attempt: int, age: float, jitter: float, retry_after: float | None
) -> None:
    """E4: for any input, the delay is finite, not negative, and within the schedule."""
    error = PublishFailed("x", reason="x", retry_after=retry_after)
    delay = POLICY.next_delay(error, attempt=attempt, age=age, jitter=jitter)
    if delay is None:
        assert age >= POLICY.give_up_after
    else:
        assert math.isfinite(delay)
        assert 0 <= delay <= POLICY.give_up_after - age


REFUSED = [
    (0.0, 0.0, 0.0, 5.0),
    (0.0, 0.0, 1.0, 10.0),
    (40.0, 0.0, 0.0, 40.0),
    (40.0, 0.0, 1.0, 80.0),
    (DAY / 2, 0.0, 1.0, 300.0),
    (40.0, 1000.0, 1.0, 1000.0),
    (DAY - 20, 1000.0, 1.0, 20.0),
    (DAY, 0.0, 0.0, None),
]


@pytest.mark.parametrize(("refused_for", "least", "jitter", "delay"), REFUSED)
def test_a_refused_job_waits_about_as_long_again(
    refused_for: float, least: float, jitter: float, delay: float | None
) -> None:
    """F6: from 5 s to 5 minutes, longer if there are many refused jobs; the last attempt is at the end."""
    assert refused_delay(refused_for, least=least, give_up_after=DAY, jitter=jitter) == delay


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("86400", MAX_RETRY_AFTER_SECONDS),
        ("86401", MAX_RETRY_AFTER_SECONDS),
        ("9" * 5000, MAX_RETRY_AFTER_SECONDS),
        ("7, 120 ,30", 120.0),
        ("Fri, 20 Nov 2026 12:01:00 GMT", 60.0),
        ("Friday, 20-Nov-26 12:01:00 GMT", 60.0),
        ("Fri Nov 20 12:01:00 2026", 60.0),
        ("Fri, 20 Nov 2026 14:01:00 +0200", 60.0),
        ("Fri, 20 Nov 2026 11:00:00 GMT", 0.0),
        ("Fri, 20 Nov 2099 12:00:00 GMT", MAX_RETRY_AFTER_SECONDS),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("1_0", None),
        ("7,", None),
        ("\uff11", None),
        ("Fri, 99 Nov 2026 12:01:00 GMT", None),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("Mon, 01 Jan 2027 00:00:00 +99999999999999", None),
    ],
)
def test_parse_retry_after(value: str, expected: float | None) -> None:
    """E5: seconds and the three forms of an HTTP date, up to a day; an invalid value is ignored."""
    assert parse_retry_after(value, now=NOW) == expected


@given(
    st.text()
    | st.from_regex(r"Mon, [0-9]{1,2} Jan [0-9]{1,30} 00:00:00 (GMT|[+-][0-9]{1,30})", fullmatch=True)
)
def test_parse_retry_after_takes_anything(value: str) -> None:
    """E5: for any header value the delay is from 0 to a day, or None."""
    seconds = parse_retry_after(value, now=NOW)
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_SECONDS
