"""`receiver settings`: the settings in force."""

from functools import partial

from receiver.cli.client import with_client
from receiver.cli.options import Json
from receiver.cli.terminal import print_result, print_rows, print_title
from receiver.settings_report import SettingsReport


def settings(json: Json = False) -> None:
    """Show the settings in force and where each comes from, without a secret.

    With --url they are those of the receiver there; otherwise those that a process in this folder would have.
    """
    found = with_client(lambda client: client.show_settings())
    print_result(found, partial(_print, found), json=json)


def _print(found: SettingsReport) -> None:
    print_rows(found["settings"], "name", "value", "origin", none="No settings.")
    print_title("Destinations", found["destinations"])
    print_rows(found["destinations"], "name", "url", "when", "gets", "options", none="No destination.")
    print_title("Sources", found["sources"])
    sources = [
        {**each, **{key: ", ".join(each[key]) for key in ("secret_ids", "retired_secret_ids")}}
        for each in found["sources"]
    ]
    print_rows(sources, "name", "environment", "secret_ids", "retired_secret_ids", none="No source.")
    print_title("Tokens", found["tokens"])
    tokens = [{**each, "scopes": ", ".join(each["scopes"])} for each in found["tokens"]]
    print_rows(tokens, "name", "scopes", none="No token: /v1 rejects every call.")
