"""The receiver's commands inside a test's process."""

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from structlog.testing import capture_logs

from receiver.cli import main
from support.events import World


@dataclass(frozen=True, kw_only=True)
class Output:
    """The output of a command and its exit status."""

    status: int
    out: str
    err: str


class Commands:
    """Runs commands in this process, on the database of a world."""

    def __init__(
        self,
        world: World,
        capsys: pytest.CaptureFixture[str],
        patch: pytest.MonkeyPatch,
        *,
        cdn: str = "",
    ) -> None:
        self.world = world
        self.cdn = cdn
        self._capsys = capsys
        self._patch = patch

    async def try_(self, *arguments: str) -> Output:
        """Run a command in a thread, because it starts an event loop of its own."""
        self._patch.setattr(sys, "argv", ["receiver", *arguments])
        self._capsys.readouterr()
        status = await asyncio.to_thread(self._main)
        captured = self._capsys.readouterr()
        return Output(status=status, out=captured.out, err=" ".join(captured.err.split()))

    @staticmethod
    def _main() -> int:
        try:
            main()
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    async def run(self, *arguments: str) -> str:
        """Run a command that succeeds; return its output."""
        said = await self.try_(*arguments)
        assert said.status == 0, said
        return said.out

    async def json(self, *arguments: str) -> Any:
        """Run a command that succeeds with --json; return its output."""
        return json.loads(await self.run(*arguments, "--json"))

    async def error(self, *arguments: str, status: int = 1) -> str:
        """Run a command that fails; return its error."""
        said = await self.try_(*arguments)
        assert said.status == status, said
        return said.err


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the logging of this process as it is, and log lines out of the commands' output."""
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    with capture_logs():
        yield
