"""`receiver healthcheck`: check the processes of this container."""

import typer

from receiver import heartbeat
from receiver.cli.remote import local_only


@local_only("it checks the processes of this machine")
def healthcheck() -> None:
    """Check that every `serve` and `worker` of this user in this container or on this machine works.

    A web process has to answer /livez, and a worker needs a recent heartbeat. The database is not checked,
    because a restart of the container would not repair it. The exit status is 0 if all work.
    """
    raise typer.Exit(heartbeat.run_check())
