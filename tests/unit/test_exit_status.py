"""The error that a command prints, and the name of a user without an entry in /etc/passwd."""

import getpass
import os
import re
from pathlib import Path

import pytest

from receiver import exit_status
from receiver.cli.terminal import user_name
from receiver.errors import (
    ClipiaUnavailable,
    DatabaseUnavailable,
    ReceiverError,
    ReceiverUnavailable,
    RefusedByClipia,
    RequestError,
    SettingsError,
    StorageUnavailable,
    UsageError,
)


@pytest.mark.parametrize(
    ("error", "expected", "status"),
    [
        (SettingsError("write X"), "write X", 2),
        (UsageError("write Y"), "write Y", 2),
        (RequestError("limit: write less", code="invalid_request"), "limit: write less", 2),
        (RequestError("there is no such job", code="not_found"), "there is no such job", 4),
        (RequestError("no such model", code="model_not_found"), "no such model", 4),
        (RequestError("the storage is away", code="service_unavailable"), "the storage is away", 6),
        (RequestError("too late", code="not_cancelable"), "too late", 5),
        (RequestError("this needs a token", code="invalid_token"), "this needs a token", 5),
        (RefusedByClipia("no credits", code="insufficient_credits", status=402), "no credits", 5),
        (DatabaseUnavailable("it is away", reason="database"), "it is away", 6),
        (ReceiverUnavailable("no answer", reason="unreachable"), "no answer", 6),
        (ClipiaUnavailable("no answer", reason="connect"), "no answer", 6),
        (StorageUnavailable("it is full", reason="full"), "it is full", 6),
        (ReceiverError("the demo failed"), "the demo failed", 1),
        (PermissionError(13, "Permission denied", "/data/x"), "PermissionError: access denied: /data/x", 1),
        (OSError(28, "No space left on device"), "OSError: the disk is full", 1),
        (
            FileNotFoundError(2, "No such file", "a\nb"),
            "FileNotFoundError: No such file or directory: 'a\\nb'",
            1,
        ),
        (ExceptionGroup("several", [SettingsError("write X")]), "write X", 1),
    ],
)
def test_an_error_is_one_sentence(
    capsys: pytest.CaptureFixture[str], error: Exception, expected: str, status: int
) -> None:
    """Our own errors print their message; others print their class, their number's meaning and the file."""

    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        exit_status.run(command)
    assert exit_.value.code == status
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_each_status_is_documented_and_has_one_meaning() -> None:
    """docs/operating.md has a row for each status, and no two of them are equal."""
    page = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")
    statuses = [value for name, value in vars(exit_status).items() if name.isupper() and name[0] != "_"]
    assert len(set(statuses)) == len(statuses) == 8
    for status in statuses:
        assert re.search(rf"^\| {status}[ ,]", page, re.MULTILINE), status


def test_no_text_of_a_library_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error prints its class at every log level, and no text of an exception in its chain."""
    text = "a-key"

    def command() -> None:
        raise RuntimeError(text) from ValueError(text)

    for level in ("INFO", "DEBUG"):
        monkeypatch.setenv("RECEIVER_LOG_LEVEL", level)
        with pytest.raises(SystemExit):
            exit_status.run(command)
        said = capsys.readouterr().err
        assert said.startswith("error: unexpected RuntimeError: ")
        assert "a-key" not in said
        assert ("builtins.ValueError was raised at" in said) == (level == "DEBUG")


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 54321"), OSError("no user")])
def test_a_user_without_a_name_is_called_by_number(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """If a container's user has no entry in /etc/passwd, the record says `uid-…`."""

    def unknown() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", unknown)
    assert user_name() == f"uid-{os.getuid()}"
