"""`receiver mcp`: tools for agents on standard input and output."""

from importlib.util import find_spec
from typing import Annotated

import typer

from receiver.cli.client import with_client
from receiver.cli.remote import find_remote
from receiver.client import Client
from receiver.errors import SettingsError
from receiver.logs import configure_logging
from receiver.setting_fields import SCOPES
from receiver.settings import Settings


def mcp(
    allow_write: Annotated[
        bool,
        typer.Option(
            "--allow-write", help="Offer the tools that act: retry, replay, discard, pause, resubmit."
        ),
    ] = False,
) -> None:
    """Offer tools to an agent over MCP on standard input and output: generate, explain, count replays.

    An agent's program starts this command, and ends it by closing standard input. It works with this
    machine's database, or with the receiver at --url, where the token's scopes decide which tools there are.
    Standard output has messages of the protocol alone; the log goes to standard error.
    """
    if find_spec("mcp") is None:
        raise SettingsError(
            "agents need the package mcp; install it with: pip install 'clipia-receiver[mcp]'"
        )
    remote = find_remote()
    internal_url = Settings.load().internal_url if remote is None else remote[0].rstrip("/")

    async def run(client: Client) -> None:
        from receiver.mcp.stdio import find_scopes, serve  # noqa: PLC0415 - the package may be missing
        from receiver.mcp.table import tools_for  # noqa: PLC0415 - likewise

        configure_logging(level="WARNING")
        scopes = SCOPES if remote is None else await find_scopes(client)
        await serve(tools_for(scopes, allow_write=allow_write), client, internal_url=internal_url)

    with_client(run)
