"""The addresses of the callback, and the metrics and log records of wrong ones."""

import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.commands import ReceiverProcess
from support.payloads import SECRET, body, signed

SECONDS = 15.0


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    """Run a receiver."""
    with ReceiverProcess(tmp_path_factory.mktemp("receiver")) as running:
        yield running


def call(
    receiver: ReceiverProcess, path: str, *, method: str = "POST", sign: bool = True
) -> tuple[int, bytes]:
    """Send a webhook to exactly this path; return the status and the body of the answer."""
    address = urlsplit(receiver.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SECONDS)
    try:
        content = body()
        connection.request(method, path, body=content, headers=signed(content) if sign else {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def count(receiver: ReceiverProcess, reason: str) -> float:
    """Return the number of rejections with a reason; fail if a client's text has become a label."""
    metrics = call(receiver, "/metrics", method="GET")[1].decode()
    found = re.findall(r'receiver_rejections_total\{reason="(\w+)",source="([^"]*)"\} (\S+)', metrics)
    assert {source for _, source, _ in found} <= {"-", "clipia"}
    return sum(float(value) for name, _, value in found if name == reason)


def wait_for_lines(receiver: ReceiverProcess, reason: str, *, number: int) -> list[dict[str, object]]:
    """Wait until the log has this many lines about a reason, and return them."""
    deadline = time.monotonic() + SECONDS
    while True:
        lines = [record for record in receiver.records() if record.get("reason") == reason]
        if len(lines) >= number or time.monotonic() > deadline:
            return lines
        time.sleep(0.05)


SAME_ADDRESS = [
    "/clipia/webhook",
    "/clipia/webhook/",
    "//clipia/webhook",
    "///clipia//webhook//",
    "/clipia/webhook/clipia",
    "/clipia/webhook/clipia/",
    "/clipia//webhook/clipia//",
    "/%63lipia/webhook",
    "/clipia%2Fwebhook",
    "/clipia/webhook%2f",
    "/%2Fclipia/webhook",
    "/clipia/webhook/%63lipia/",
    "/clipia/webhook/?a=b",
    "http://hooks.example.com/clipia/webhook/",
]


@pytest.mark.parametrize("path", SAME_ADDRESS)
def test_other_spellings_of_the_address_reach_the_callback(receiver: ReceiverProcess, path: str) -> None:
    """B12: the callback ignores extra slashes and escapes, without a redirect; other methods are 405."""
    status, answer = call(receiver, path)
    assert (status, json.loads(answer)["status"]) == (200, "accepted")
    assert call(receiver, path, sign=False)[0] == 401
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert call(receiver, path, method=method)[0] == 405


WRONG_ADDRESS = {
    "/webhook": "unknown_path",
    "/": "unknown_path",
    "/clipia/webhooks": "unknown_path",
    "/clipia": "unknown_path",
    "/clipia/webhook/clipia/a/b": "unknown_path",
    "/clipia/webhook/absent": "unknown_source",
    "/clipia/webhook/absent/": "unknown_source",
    "//clipia/webhook/CLIPIA": "unknown_source",
    "/clipia/webhook/absent/0b2a6a0e-3f5c-4a53-9b6f-0d6a5e4f3c2b": "unknown_source",
}


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("path", WRONG_ADDRESS)
def test_a_wrong_address_is_counted(receiver: ReceiverProcess, path: str, *, sign: bool) -> None:
    """G11: a webhook for an unknown path or source is a 404 that the metrics count."""
    before = count(receiver, WRONG_ADDRESS[path])
    assert call(receiver, path, sign=sign)[0] == 404
    assert count(receiver, WRONG_ADDRESS[path]) == before + 1


def test_other_requests_with_404_are_not_counted(receiver: ReceiverProcess) -> None:
    """G11: a GET of a browser or a scanner is not counted as a webhook."""
    before = count(receiver, "unknown_path")
    assert call(receiver, "/favicon.ico", method="GET")[0] == 404
    assert count(receiver, "unknown_path") == before


def test_a_wrong_address_is_logged_without_secrets_and_not_too_often(tmp_path: Path) -> None:
    """A18, G11: the log has the path of a 404 without secrets, and at most one record per second."""
    with ReceiverProcess(tmp_path) as receiver:
        began = time.monotonic()
        for _ in range(40):
            assert call(receiver, "/hooks/%1b[31m%0a/x?key=query-secret")[0] == 404
            assert call(receiver, f"/clipia/webhook/{SECRET}")[0] == 404
        wrong = wait_for_lines(receiver, "unknown_path", number=1)
        unknown = wait_for_lines(receiver, "unknown_source", number=1)
        assert 1 <= len(wrong) <= time.monotonic() - began + 1
        assert 1 <= len(unknown) <= time.monotonic() - began + 1
        assert count(receiver, "unknown_path") == count(receiver, "unknown_source") == 40
    assert wrong[0]["path"] == "/hooks/\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}/x"
    assert unknown[0]["path"] == f"/clipia/webhook/{SECRET[:4]}…"
    log = receiver.log.read_text(encoding="utf-8")
    assert SECRET not in log
    assert "query-secret" not in log
