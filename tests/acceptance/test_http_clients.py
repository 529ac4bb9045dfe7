"""Clients that offer an upgrade to HTTP/2, against a running receiver and sandbox."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ReceiverProcess, command_environment
from support.payloads import SECRET, body, signed
from support.servers import end, free_port, missing, wait_for_port

TOKEN = "token-of-sixteen-characters"


def curl(url: str, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    """Post with `curl --http2`, which offers `Upgrade: h2c`; return the status and the JSON answer."""
    program = shutil.which("curl") or ""
    if not program:
        missing("curl", "apt-get install curl")
    fields = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    arguments = [program, "-sS", "--max-time", "60", "--http2", *fields, "--data-binary", "@-", url]
    result = subprocess.run(
        [*arguments, "-w", "\n%{http_code}"], input=content, capture_output=True, timeout=90, check=True
    )
    answer, _, status = result.stdout.rpartition(b"\n")
    return int(status), json.loads(answer)


@pytest.mark.parametrize("framing", [{}, {"Transfer-Encoding": "chunked"}], ids=["length", "chunked"])
def test_a_client_that_offers_http2_is_served(tmp_path: Path, framing: dict[str, str]) -> None:
    """B4: a client that offers h2c, as Java's does by default, submits jobs and posts webhooks."""
    port = free_port()
    clipia = f"http://127.0.0.1:{port}"
    sandbox = subprocess.Popen(
        [sys.executable, "-m", "receiver", "sandbox", "--port", str(port)],
        env=command_environment(CLIPIA_WEBHOOK_SECRET=SECRET),
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, sandbox)
        key = {"Authorization": "Bearer clipia_live_offers", "Content-Type": "application/json"}
        prompt = b'{"input": {"prompt": "a cat"}}'
        status, accepted = curl(f"{clipia}/v1/models/nano-banana-2", prompt, key | framing)
        assert status in {200, 202}, accepted
        settings = {
            "CLIPIA_KEY": "clipia_live_offers",
            "CLIPIA_BASE_URL": clipia,
            "RECEIVER_API_TOKENS": f"shop:{TOKEN}",
        }
        with ReceiverProcess(tmp_path, **settings) as receiver:
            content = body("offered")
            status, event = curl(f"{receiver.url}/clipia/webhook", content, signed(content) | framing)
            assert (status, event["status"]) == (200, "accepted")
            headers = {"Authorization": f"Bearer {TOKEN}", "Idempotency-Key": "k"} | framing
            order = b'{"model": "nano-banana-2", "input": {"prompt": "a cat"}}'
            first = curl(f"{receiver.url}/v1/jobs", order, headers)
            assert first[0] == 201, first
            # The same key with white space after it is the same job, which is paid for once.
            again = curl(f"{receiver.url}/v1/jobs", order, headers | {"Idempotency-Key": "k \t"})
            assert (again[0], again[1]["id"]) == (200, first[1]["id"])
    finally:
        end(sandbox)
