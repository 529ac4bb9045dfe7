"""`receiver` and `python -m receiver`."""

import os
import signal
import sys
from types import FrameType
from typing import Final

TERMINATED: Final = 128 + signal.SIGTERM
"""The exit status with which shells report a process that SIGTERM ended."""
INTERRUPTED: Final = 128 + signal.SIGINT


def main() -> None:
    """Run the command line."""
    # The first process of a container ignores SIGTERM if it has no handler. The handler is set before the
    # imports, because these take a second; servers replace it with their own.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run()
    except KeyboardInterrupt:  # during an import
        sys.exit(INTERRUPTED)


def _run() -> None:
    if sys.argv[1:] == ["healthcheck"]:
        # Importing all commands takes a second of CPU, and a health check runs every few seconds.
        from receiver.heartbeat import run_check

        sys.exit(run_check())
    from receiver import exit_status

    exit_status.run(_run_commands)


def _run_commands() -> None:
    _require_metrics_folder()
    from receiver.cli import app

    app()


def _require_metrics_folder() -> None:
    """Raise SettingsError if prometheus_client, which reads the variable when imported, could not use it."""
    from receiver.errors import SettingsError

    name = "PROMETHEUS_MULTIPROC_DIR"
    folder = os.environ.get(name) or os.environ.get(name.lower())
    # The dot makes both checks fail for a path that is not a folder.
    if folder is not None and not os.access(f"{folder}/.", os.W_OK | os.X_OK):
        raise SettingsError(
            f"{name} names no folder that this user can write to: make the folder, or unset the variable "
            "(`receiver serve --workers` makes its own folder)"
        )


def _terminate(_number: int, _frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


if __name__ == "__main__":
    main()
