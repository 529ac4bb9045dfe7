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
    _keep_metrics_in_memory()
    from receiver.cli import app

    app()


def _keep_metrics_in_memory() -> None:
    """Unset the variables that prometheus_client reads when it is imported.

    With one of them it would keep all metrics in files, show some gauges as 0, and fail without the folder.
    Each of our processes has a port for its own metrics.
    """
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        os.environ.pop(name, None)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    sys.exit(TERMINATED)


if __name__ == "__main__":
    main()
