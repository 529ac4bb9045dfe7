"""The table of commands: their names and the first sentences of their help, and a way to their modules.

Importing the modules of all commands takes a second of CPU, which `--version` and each shell completion would
take. So the module of a command is imported when the command is used; a test compares the sentences.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

SENTENCES: Final[Mapping[str, str]] = {
    "demo": "Run a sandbox and a receiver, and watch three jobs from submission to the forwarded message.",
    "serve": (
        "Receive webhooks and serve the internal API; with a worker, save the media and forward the events."
    ),
    "worker": (
        "Save media, forward events and submit jobs; any number of workers may share a PostgreSQL database."
    ),
    "submit": "Submit a job to Clipia exactly once, even if a process crashes meanwhile.",
    "models": "List Clipia's models with their prices, or show one with its parameters.",
    "estimate": "Print the price of a job without submitting it.",
    "account": (
        "Show the account's credits and limits, and whether Clipia's figures match the receiver's own."
    ),
    "replay": "Send stored events again, with the same event ids, new delivery ids and the replay's id.",
    "prune": "Delete old events with their receipts, deliveries and attempts, and the inputs of old jobs.",
    "route": "Show which destinations a stored event goes to, and which filter keeps it from the others.",
    "dashboard": (
        "Serve the dashboard of this machine's database on 127.0.0.1, and print a token to log in with."
    ),
    "sandbox": "Run a local Clipia: the documented API, signed webhooks and a small CDN, on one origin.",
    "status": (
        "Show lanes, destinations, workers, jobs and disks on one screen, and the next command for "
        "each problem."
    ),
    "tail": "Print new events, deliveries, failures and rejected requests as they happen, until Ctrl-C.",
    "why": "Explain in one sentence why an object is in its state, with the facts and the next command.",
    "mcp": (
        "Offer tools to an agent over MCP on standard input and output: generate, explain, count replays."
    ),
    "migrate": (
        "Upgrade the database's schema to this release; safe to run at any time, and several times at once."
    ),
    "check": (
        "Check the settings, database, storage, destinations and API key, and print how to fix each problem."
    ),
    "settings": "Show the settings in force and where each comes from, without a secret.",
    "healthcheck": (
        "Check that every `serve` and `worker` of this user in this container or on this machine works."
    ),
    "send": "Sign a payload with the source's first secret and post it to a receiver, like Clipia does.",
    "jobs": "Show jobs and their cost, resubmit or cancel them, and freeze submissions.",
    "events": "Show, fetch, export, import, recover, promote and erase events.",
    "deliveries": (
        "List and show deliveries, retry dead letters, and move or discard those of a removed destination."
    ),
    "destinations": "List, pause, resume and test destinations.",
    "replays": "Show, watch and cancel replays.",
    "media": "Verify stored files, print links to them, and give up downloads.",
    "rejections": "Show rejected requests to the callback, and why.",
    "alerts": "Show alerts, with the next command for each.",
    "audit": "Show the actions of operators, with reasons and outcomes.",
    "retention": "Show the runs of retention and their results.",
}
GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "jobs": ("list", "show", "resubmit", "cancel", "freeze", "thaw", "cost"),
    "events": ("list", "show", "fetch", "export", "import", "recover", "promote", "erase"),
    "deliveries": ("list", "retry", "move", "show", "failures", "discard"),
    "destinations": ("list", "pause", "resume", "test"),
    "replays": ("list", "show", "cancel"),
    "media": ("verify", "link", "give-up"),
    "rejections": ("list", "causes", "show"),
    "alerts": ("list",),
    "audit": ("list",),
    "retention": ("list",),
}
"""The commands of each group, in the order of its help."""
_MODULES: Final[Mapping[str, str]] = {
    "account": "catalogue",
    "estimate": "catalogue",
    "models": "catalogue",
    "replays": "replay",
}
"""Modules with another name than the command's."""


def load(name: str) -> Any:
    """Return the function of a command, or the Typer object of a group. It has the command's name."""
    module = import_module(f"receiver.cli.{_MODULES.get(name, name)}")
    return getattr(module, name)
