"""`receiver submit` against a receiver whose answers come from a function."""

import re
from functools import partial

import httpx
import orjson
import pytest
from typer.testing import CliRunner

from receiver.api.examples import JOB
from receiver.cli import app
from receiver.client import Client
from receiver.errors import ReceiverUnavailable

SUBMIT = ["submit", "nano-banana-2", "--input", '{"prompt": "a cat"}']


def test_a_lost_answer_names_the_key_of_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without `--key`, a command that loses the answer prints the key with which it is the same job."""
    keys: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers.get("idempotency-key"))
        if len(keys) == 1:
            raise httpx.ReadError("reset")
        status, code = (201, None) if len(keys) == 2 else (400, "model_input_invalid")
        error = {"error": {"type": "invalid_request_error", "code": code, "message": "x"}}
        return httpx.Response(status, content=orjson.dumps(error if code else JOB))

    monkeypatch.setenv("RECEIVER_URL", "http://receiver.test")
    monkeypatch.setenv("RECEIVER_TOKEN", "operator-0123456789abcdef")
    monkeypatch.setattr("receiver.cli.client.Client", partial(Client, transport=httpx.MockTransport(answer)))
    lost = CliRunner().invoke(app, SUBMIT)
    assert isinstance(lost.exception, ReceiverUnavailable)
    (key,) = re.findall("Repeat the command with `--key (.*)`", lost.stderr + capsys.readouterr().err)
    assert CliRunner().invoke(app, [*SUBMIT, "--key", key]).exit_code == 0
    assert keys == [key, key]
    refused = CliRunner().invoke(app, SUBMIT)
    assert "--key" not in refused.output + capsys.readouterr().err
    assert keys[2] not in (None, key)
