"""Traces across processes: a sandbox, receivers, a destination, and a collector that takes spans."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from support.commands import ReceiverProcess
from support.jobs import TOKEN, Sandbox, forwarded, job_receiver, wait_until_done

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
SPEECH = {"model": "gemini-3-1-flash-tts", "input": {"prompt": "a cat"}}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Return a sandbox for all tests of this file."""
    with Sandbox(tmp_path_factory.mktemp("sandbox"), duration=0.1) as found:
        yield found


def submit(receiver: ReceiverProcess, key: str, headers: Sequence[tuple[str, str]] = ()) -> str:
    """Submit a job over HTTP and return its id."""
    given = [("authorization", f"Bearer {TOKEN}"), ("idempotency-key", key), *headers]
    response = httpx.post(f"{receiver.url}/v1/jobs", json=SPEECH, headers=given, trust_env=False, timeout=60)
    assert response.status_code in (200, 201, 202), response.text
    return str(response.json()["id"])


def test_a_callers_trace_is_passed_on_without_tracing(sandbox: Sandbox, tmp_path: Path) -> None:
    """The message of a job has the `traceparent` of its submission, with no extra and no collector."""
    with job_receiver(tmp_path / "receiver", sandbox) as receiver:
        wanted = {
            submit(
                receiver, "traced", [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]
            ): (
                PARENT,
                "a=1,b=2",
            ),
            submit(receiver, "plain"): (None, None),
            submit(receiver, "doubled", [("traceparent", PARENT), ("traceparent", PARENT)]): (None, None),
            submit(receiver, "invalid", [("traceparent", PARENT.upper())]): (None, None),
        }
        # The first submission of a key decides.
        submit(receiver, "traced", [("traceparent", f"00-{'1' * 32}-{SPAN}-01")])
        wait_until_done(receiver.settings["RECEIVER_DATABASE_URL"])
        messages = forwarded(tmp_path / "receiver")
        sent = {
            each["data"]["job"]["id"]: (each.get("traceparent"), each.get("tracestate")) for each in messages
        }
        assert sent == wanted
