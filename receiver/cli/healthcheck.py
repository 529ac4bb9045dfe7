"""`receiver healthcheck`: tell whether what runs in this container works."""

import typer

from receiver import heartbeat


def healthcheck() -> None:
    """Tell whether each `serve` and `worker` of this user on this machine or in this container works.

    A web process has to answer /livez, on whichever port it listens, and a worker has to have a recent
    heartbeat. The database is not asked: a restart would not bring it back. The exit status is 0 if all work.
    """
    raise typer.Exit(heartbeat.run_check())
