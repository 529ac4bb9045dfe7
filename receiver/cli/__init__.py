"""The command line: each module has one command or one group of them."""

from typing import Any

import typer
from typer.core import TyperGroup

from receiver import __version__, exit_status
from receiver.cli.audit import audit
from receiver.cli.catalogue import account, estimate, models
from receiver.cli.check import check
from receiver.cli.client import choose
from receiver.cli.deliveries import deliveries
from receiver.cli.demo import demo
from receiver.cli.events import events
from receiver.cli.healthcheck import healthcheck
from receiver.cli.jobs import jobs
from receiver.cli.media import media
from receiver.cli.migrate import migrate
from receiver.cli.prune import prune
from receiver.cli.rejections import rejections
from receiver.cli.replay import replay, replays
from receiver.cli.route import route
from receiver.cli.sandbox import sandbox
from receiver.cli.send import send
from receiver.cli.serve import serve
from receiver.cli.status import status
from receiver.cli.submit import submit
from receiver.cli.worker import worker


class _Group(TyperGroup):
    """A group whose help has the whole first sentence of each command."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        # click's own method cuts each sentence off after one line.
        rows = [(name, self.commands[name].get_short_help_str(1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    name="receiver",
    cls=_Group,
    help="Receive the Clipia API's webhooks: verify them, store each event once, save its media, forward it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Rich would cut off the names of long options at 80 columns.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(demo, serve, worker, submit, models, estimate, account, replay, prune, route, sandbox),
    *(status, migrate, check, healthcheck, send),
):
    app.command()(command)
app.add_typer(jobs, name="jobs", cls=_Group)
app.add_typer(events, name="events", cls=_Group)
app.add_typer(deliveries, name="deliveries", cls=_Group)
app.add_typer(replays, name="replays", cls=_Group)
app.add_typer(media, name="media", cls=_Group)
app.add_typer(rejections, name="rejections", cls=_Group)
app.add_typer(audit, name="audit", cls=_Group)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    url: str | None = typer.Option(
        None,
        metavar="URL",
        help="Work with the receiver at this URL (its internal API), without access to its database. "
        "Default: RECEIVER_URL, or else this machine's database.",
    ),
    token: str | None = typer.Option(
        None,
        metavar="TOKEN",
        help="A token of that receiver, or @FILE; other users of this machine can read an argument. "
        "Default: RECEIVER_TOKEN.",
    ),
    version: bool = typer.Option(  # noqa: ARG001 - its callback acts
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Receive the Clipia API's webhooks: verify them, store each event once, save its media, forward it."""
    choose(url, token)


def main() -> None:
    """Run the command line. The exit status is 2 if the settings are wrong, and 1 for other failures."""
    exit_status.run(app)
