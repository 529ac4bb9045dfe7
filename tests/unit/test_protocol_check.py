"""The self-check of the protocol's limits, which `serve` makes before it listens."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from support.commands import command_environment
from support.payloads import SECRET
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from receiver.api.protocol import DeadlineHttpToolsProtocol
from receiver.api.protocol_check import check_protocol
from receiver.errors import SettingsError


class WithoutDeadline(DeadlineHttpToolsProtocol):
    """As if uvicorn had begun to stop all timers of a connection that has sent a byte."""

    def data_received(self, data: bytes) -> None:
        """Parse, and forget the deadline."""
        super().data_received(data)
        self._stop_deadline()


class WithLargeHeads(DeadlineHttpToolsProtocol):
    """As if the server called another method with the bytes that it reads."""

    def data_received(self, data: bytes) -> None:
        """Parse without counting."""
        HttpToolsProtocol.data_received(self, data)


class WithLongPipelines(DeadlineHttpToolsProtocol):
    """As if uvicorn kept its waiting requests elsewhere."""

    def on_headers_complete(self) -> None:
        """Take each request."""
        self._start_asgi()
        self._in_head = False


class Renamed(DeadlineHttpToolsProtocol):
    """As if a method of uvicorn had another name."""

    connection_made: ClassVar[None]  # type: ignore[assignment]  # the name must be absent

    def __getattribute__(self, name: str) -> object:
        """Fail for this name."""
        if name == "connection_made":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_the_limits_hold_on_the_pinned_versions() -> None:
    """The shipped protocol passes, without an event loop and without a line in the log."""
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()
    check_protocol()


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (WithoutDeadline, "the deadline of a head does not hold"),
        (WithLargeHeads, "the size of a head does not hold"),
        (WithLongPipelines, "the number of pipelined requests does not hold"),
        (Renamed, r"the deadline of a head cannot be checked \(AttributeError\)"),
    ],
)
def test_a_limit_that_does_not_hold_is_named(protocol: type[DeadlineHttpToolsProtocol], message: str) -> None:
    """A protocol without one of its limits does not start, and the error says what to install."""
    with pytest.raises(SettingsError, match=f"^{message} on uvicorn [0-9.]+: install the versions"):
        check_protocol(protocol)


def test_serve_does_not_start_without_a_limit(tmp_path: Path) -> None:
    """`receiver serve` makes the check before it opens its port and its database."""
    code = (
        "from receiver.api import protocol\n"
        "protocol.DeadlineHttpToolsProtocol._start_deadline = lambda _self: None\n"
        "import sys\n"
        "from receiver.__main__ import main\n"
        "sys.argv = ['receiver', 'serve', '--port', '0']\n"
        "main()\n"
    )
    settings = {"CLIPIA_WEBHOOK_SECRET": SECRET, "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path}/receiver.db"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=command_environment(**settings),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "the deadline of a head does not hold on uvicorn" in done.stderr
