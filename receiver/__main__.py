"""`receiver` and `python -m receiver`."""

import os
import signal
import sys
from types import FrameType
from typing import Final

TERMINATED: Final = 128 + signal.SIGTERM
"""The exit status of a process that SIGTERM ended, as shells report it."""
INTERRUPTED: Final = 128 + signal.SIGINT


def main() -> None:
    """Run the command line."""
    # The first process of a container has no default action for SIGTERM: without a handler it would go on.
    # Servers put their own in its place. Before the imports, which take a second.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run()
    except KeyboardInterrupt:  # during an import
        sys.exit(INTERRUPTED)


def _run() -> None:
    if sys.argv[1:] == ["healthcheck"]:
        # Importing all commands takes a second of CPU, and a health check comes every few seconds.
        from receiver.heartbeat import run_check  # noqa: PLC0415 - see above

        sys.exit(run_check())
    from receiver import exit_status  # noqa: PLC0415 - the handlers come first

    exit_status.run(_run_commands)


def _run_commands() -> None:
    _require_metrics_folder()
    from receiver.cli import app  # noqa: PLC0415 - the handlers come first

    app()


def _require_metrics_folder() -> None:
    """Raise SettingsError for a variable that prometheus_client heeds as soon as it is imported."""
    from receiver.errors import SettingsError  # noqa: PLC0415 - the handlers come first

    name = "PROMETHEUS_MULTIPROC_DIR"
    folder = os.environ.get(name) or os.environ.get(name.lower())
    # Writing needs both rights, and both fail for what is no folder.
    if folder is not None and not os.access(f"{folder}/.", os.W_OK | os.X_OK):
        raise SettingsError(
            f"{name} names no folder that this user can write to: make it, or unset the variable "
            "(`receiver serve --workers` makes a folder of its own)"
        )


def _terminate(_number: int, _frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


if __name__ == "__main__":
    main()
