"""`receiver dashboard`: the dashboard of this machine's database, with a login for this run."""

import asyncio
import secrets
from functools import partial
from typing import Annotated

import typer
from pydantic import SecretStr

from receiver.app import create_dashboard_app
from receiver.cli.database import opened_database
from receiver.cli.listeners import bind, url_of
from receiver.cli.options import MAX_PORT
from receiver.cli.remote import local_only
from receiver.cli.serve import Server, server_config
from receiver.cli.terminal import operator, print_line
from receiver.db import migrate
from receiver.logs import configure_logging
from receiver.masking import register_secret
from receiver.setting_fields import SCOPES, ApiToken
from receiver.settings import Settings

LOOPBACK = "127.0.0.1"


@local_only("it reads this machine's database; a receiver elsewhere has a dashboard of its own at /dashboard")
def dashboard(
    port: Annotated[
        int, typer.Option(help=f"Port on {LOOPBACK}; 0 takes a free one.", min=0, max=MAX_PORT)
    ] = 8002,
) -> None:
    """Serve the dashboard of this machine's database on 127.0.0.1, and print a token to log in with.

    The token is made for this run: when the command ends, its logins end. A receiver that serves the internal
    API has the dashboard, too, for RECEIVER_API_TOKENS.
    """
    configure_logging(level="WARNING")
    settings = Settings.load()
    listeners = bind(LOOPBACK, port)
    asyncio.run(_require_tables(settings))
    text = secrets.token_urlsafe(24)
    register_secret(text)
    # Not validated: the name on record is that of a command, which a token of the settings cannot have.
    token = ApiToken.model_construct(name=operator(), token=SecretStr(text), scopes=frozenset(SCOPES))
    lines = (f"dashboard: {url_of(listeners[0])}/dashboard", f"token:     {text}", "Ctrl-C stops it.")
    config = server_config(
        partial(create_dashboard_app, settings, token=token), keep_alive=settings.keep_alive
    )
    Server(config, drain=0, on_start=partial(print_line, "\n".join(lines))).run(listeners)


async def _require_tables(settings: Settings) -> None:
    async with opened_database(settings) as database:
        await migrate.require_current(database)
