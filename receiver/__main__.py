"""`receiver` and `python -m receiver`."""

import signal
import sys
from types import FrameType
from typing import Final

TERMINATED: Final = 128 + signal.SIGTERM
"""The exit status of a process that SIGTERM ended, as shells report it."""


def main() -> None:
    """Run the command line."""
    # The first process of a container has no default action for SIGTERM: without a handler it would go on.
    # Servers put their own in its place. Before the imports, which take a second.
    signal.signal(signal.SIGTERM, _terminate)
    if sys.argv[1:] == ["healthcheck"]:
        # Importing all commands takes a second of CPU, and a health check comes every few seconds.
        from receiver.heartbeat import run_check  # noqa: PLC0415 - see above

        sys.exit(run_check())
    from receiver.cli import main as run_commands  # noqa: PLC0415 - the handler comes first

    run_commands()


def _terminate(_number: int, _frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


if __name__ == "__main__":
    main()
