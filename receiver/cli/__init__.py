"""The commands. Each module holds one command or one group; this one puts them together."""

from typing import Any

import typer
from typer.core import TyperGroup

from receiver import __version__, exit_status
from receiver.cli.catalogue import account, estimate, models
from receiver.cli.check import check
from receiver.cli.deliveries import deliveries
from receiver.cli.demo import demo
from receiver.cli.events import events
from receiver.cli.healthcheck import healthcheck
from receiver.cli.jobs import jobs
from receiver.cli.media import media
from receiver.cli.migrate import migrate
from receiver.cli.prune import prune
from receiver.cli.replay import replay, replays
from receiver.cli.route import route
from receiver.cli.sandbox import sandbox
from receiver.cli.send import send
from receiver.cli.serve import serve
from receiver.cli.submit import submit
from receiver.cli.worker import worker


class _Group(TyperGroup):
    """A group whose help shows the whole first sentence of each command."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        # The library's cuts it off after one line.
        rows = [(name, self.commands[name].get_short_help_str(1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    name="receiver",
    cls=_Group,
    help="Durable receiver for the Clipia API's webhooks: verify, store once, save the media, forward.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich cuts the names of long options off at 80 columns.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo,
    serve,
    worker,
    submit,
    models,
    estimate,
    account,
    replay,
    prune,
    route,
    sandbox,
    migrate,
    check,
    healthcheck,
    send,
):
    app.command()(command)
app.add_typer(jobs, name="jobs", cls=_Group)
app.add_typer(events, name="events", cls=_Group)
app.add_typer(deliveries, name="deliveries", cls=_Group)
app.add_typer(replays, name="replays", cls=_Group)
app.add_typer(media, name="media", cls=_Group)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Durable receiver for the Clipia API's webhooks: verify, store once, save the media, forward."""


def main() -> None:
    """Run the command line. Exits with 2 if the settings are wrong, and with 1 for other failures."""
    exit_status.run(app)
