"""Logs: a traceback and a library's record show no secret."""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from receiver.cli.serve import make_app
from receiver.destinations.base import quoted
from receiver.errors import PublishFailed
from receiver.lanes.attempts import stored_text
from receiver.logs import _exceptions, _mask_event, _mask_quoted
from receiver.masking import MASK, register_secret
from receiver.settings import Settings

SECRET = "cAnArY8f3b61d2e9"


def logged(error: BaseException) -> str:
    """Return the traceback as it is logged."""
    return str(_exceptions(None, "error", {"event": "x", "exc_info": error})["exception"])


def test_a_traceback_masks_the_words_of_libraries() -> None:
    """G8: frames and classes are logged; a library's text is masked and cut, along the whole chain."""
    register_secret(SECRET)

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
    """G8: errors of a task group are logged and masked, too."""
    register_secret(SECRET)
    text = logged(ExceptionGroup("two", [ValueError(SECRET), PublishFailed("our own words", reason="x")]))
    assert "ExceptionGroup: two" in text
    assert f"ValueError: {MASK}" in text
    assert "PublishFailed: our own words" in text


def test_an_endless_chain_ends() -> None:
    """A circular chain of causes is cut."""
    error = ValueError("a")
    error.__cause__ = ValueError("b")
    error.__cause__.__cause__ = error
    assert "ValueError: a" in logged(error)


def test_records_of_libraries_are_masked() -> None:
    """G8: asyncio puts the exception's repr into its own message, which is masked."""
    register_secret(SECRET)
    event: dict[str, Any] = {"event": f"Task exception was never retrieved: ValueError('{SECRET}')"}
    assert SECRET not in json.dumps(dict(_mask_event(logging.getLogger(), "error", event)))


def test_fields_that_quote_are_masked() -> None:
    """G8: a field with an error is masked again."""
    register_secret(SECRET)
    event: dict[str, Any] = {"event": "x", "error": SECRET, "problem": SECRET, "count": 3}
    assert _mask_quoted(structlog.get_logger(), "error", event) == {
        "event": "x",
        "error": MASK,
        "problem": MASK,
        "count": 3,
    }


def test_an_unexpected_error_goes_on_record_by_its_class() -> None:
    """G8: rows are shown to callers, so a library's text is in the log only."""
    assert stored_text(ValueError(SECRET)) == "ValueError, see the log"
    assert stored_text(PublishFailed("our own words", reason="x")) == "PublishFailed: our own words"


def test_a_process_that_was_spawned_masks_all_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """G8: a process of `serve --workers`, which gets its settings from its parent, masks the same secrets."""
    secrets = {name: sha256(name.encode()).hexdigest() for name in SPAWNED_SECRETS}
    config = "".join(
        f'[[destinations]]\nname = "{kind}"\nurl = "{url}"\n'
        for kind, url in (("broker", "amqp://u:${BROKER}@host"), ("signed", "https://host"))
    )
    config += 'secret = "${SIGNING}"\n[[sources]]\nname = "other"\nsecret = "${SOURCE}"\n'
    (tmp_path / "receiver.toml").write_text(config)
    for name, secret in secrets.items():
        monkeypatch.setenv(name, SPAWNED_SECRETS[name].format(secret))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        said = pool.submit(quoted_by_app, Settings.load(), list(secrets.values())).result(timeout=120)
    assert dict(zip(secrets, said, strict=True)) == dict.fromkeys(secrets, f"refused {MASK}")


SPAWNED_SECRETS = {
    "CLIPIA_KEY": "{}",
    "CLIPIA_WEBHOOK_SECRET": "{}",
    "RECEIVER_API_TOKENS": "caller:{}",
    "RECEIVER_DATABASE_URL": "postgresql://u:{}@h/d",
    "RECEIVER_STORAGE_URL": "s3://bucket?secret_access_key={}",
    "RECEIVER_DESTINATION_URL": "nats://{}@host",
    "BROKER": "{}",
    "SIGNING": "{}",
    "SOURCE": "{}",
    "AWS_SECRET_ACCESS_KEY": "{}",
    "PGPASSWORD": "{}",
}
"""Variables, and the spelling of a secret in each."""


def quoted_by_app(settings: Settings, secrets: Sequence[str]) -> list[str]:
    """Make the application as a web process does; return quotes of a peer that repeats secrets."""
    make_app(settings, multiprocess=True, only="webhook", worker=False)
    return [quoted(f"refused {secret}") for secret in secrets]
