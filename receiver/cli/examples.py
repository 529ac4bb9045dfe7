"""Examples of commands, which end their help; a test parses each with the real command line."""

from collections.abc import Mapping
from typing import Final

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "demo": ("receiver demo", "receiver demo --dir /tmp/demo --keep"),
    "serve": (
        "receiver serve --host 0.0.0.0 --port 8000",
        "receiver serve --only webhook --no-worker --workers 2",
    ),
    "worker": ("receiver worker --metrics-port 9102",),
    "submit": (
        'receiver submit nano-banana-2 -i \'{"prompt": "a cat"}\' --wait',
        "receiver submit nano-banana-2 -i @input.json --key order-4711/hero",
        "receiver submit nano-banana-2 -i @input.json --max-cost 20 --wait",
    ),
    "models": ("receiver models", "receiver models nano-banana-2 --json"),
    "estimate": ('receiver estimate nano-banana-2 -i \'{"prompt": "a cat"}\'',),
    "account": ("receiver account --json",),
    "replay": (
        "receiver replay r-4711 --to orders",
        "receiver replay --since 2h --destination orders --dry-run",
        "receiver replay --all --media --reason 'lost disk' --rate 50",
    ),
    "prune": ("receiver prune --older-than 90d --dry-run", "receiver prune --older-than 90d --media"),
    "route": ("receiver route r-4711",),
    "dashboard": ("receiver dashboard", "receiver dashboard --port 8003"),
    "sandbox": ("receiver sandbox", "receiver sandbox --port 9001 --webhook-loss-rate 0.5 --fail-rate 0.1"),
    "status": ("receiver status --watch", "receiver --url https://receiver.internal status --json"),
    "tail": ("receiver tail --failures", "receiver tail --destination orders --timeout 60 --json"),
    "why": ("receiver why r-4711", "receiver why order-4711/hero --json"),
    "mcp": ("receiver mcp", "receiver --url https://receiver.internal --token @token mcp --allow-write"),
    "migrate": ("receiver migrate",),
    "settings": ("receiver settings", "receiver settings --json"),
    "check": ("receiver check", "receiver check --json"),
    "healthcheck": ("receiver healthcheck",),
    "send": (
        "receiver send payload.json",
        "receiver send - --url https://hooks.example.com/clipia/webhook",
    ),
    "jobs list": ("receiver jobs list --state unsure", "receiver jobs list --caller shop --since 1d --json"),
    "jobs show": ("receiver jobs show 01a1fdfe-da8d-7f2d-8a66-991a87796372",),
    "jobs resubmit": ("receiver jobs resubmit r-4711 --yes --reason 'not in the console'",),
    "jobs cancel": ("receiver jobs cancel r-4711 --yes --reason 'ordered twice'",),
    "jobs freeze": ("receiver jobs freeze --restored --reason 'dump of 04:00'",),
    "jobs thaw": ("receiver jobs thaw --reason 'no job is missing'",),
    "jobs cost": ("receiver jobs cost --by caller --since 7d",),
    "events list": (
        "receiver events list --since 1h --state unrecognized",
        "receiver events list --delivery-state dead --destination orders",
        "receiver events list --metadata order=4711 --json",
    ),
    "events show": ("receiver events show r-4711", "receiver events show r-4711 --json"),
    "events export": ("receiver events export events.jsonl --since 2026-11-01",),
    "events import": ("receiver events import events.jsonl",),
    "events recover": ("receiver events recover --dry-run",),
    "events promote": ("receiver events promote r-4711 42 --dry-run",),
    "events fetch": ("receiver events fetch c7b6521b-55d1-46c4-8952-f1af51482c78",),
    "events erase": ("receiver events erase r-4711",),
    "deliveries list": (
        "receiver deliveries list --state dead",
        "receiver deliveries list --destination orders --since 1h --json",
    ),
    "deliveries retry": (
        "receiver deliveries retry --destination orders --since 2h",
        "receiver deliveries retry 01a1fe1f-4d6d-74d7-af73-a0b5ac94520e",
    ),
    "deliveries move": ("receiver deliveries move old-orders orders --dry-run",),
    "deliveries show": ("receiver deliveries show 01a1fe1f-4d6d-74d7-af73-a0b5ac94520e --message",),
    "deliveries failures": ("receiver deliveries failures --destination orders",),
    "deliveries discard": ("receiver deliveries discard old-orders --dead --reason 'shop closed'",),
    "destinations list": ("receiver destinations list",),
    "destinations pause": ("receiver destinations pause orders --reason 'maintenance'",),
    "destinations resume": ("receiver destinations resume orders",),
    "destinations test": ("receiver destinations test orders --send",),
    "replays list": ("receiver replays list --limit 10",),
    "replays show": ("receiver replays show 01a1fe1f-4d6d-74d7-af73-a0b5ac94520e --wait",),
    "replays cancel": ("receiver replays cancel 01a1fe1f-4d6d-74d7-af73-a0b5ac94520e",),
    "media verify": ("receiver media verify --since 1d",),
    "media link": ("receiver media link r-4711 --hours 24",),
    "media give-up": ("receiver media give-up r-4711 --dry-run",),
    "rejections list": ("receiver rejections list --since 1d --cause unknown_secret",),
    "rejections causes": ("receiver rejections causes --since 1d",),
    "rejections show": ("receiver rejections show 17",),
    "alerts list": ("receiver alerts list",),
    "retention list": ("receiver retention list", "receiver retention list --json"),
    "audit list": ("receiver audit list --since 7d --operation erase_event",),
}
"""By the words of the command."""


def epilog_of(words: str) -> str | None:
    """Return the end of a command's help; None for a group."""
    found = EXAMPLES.get(words)
    # The library does not wrap the lines after a \b.
    return None if found is None else "\n".join(("\b", "Examples:", *(f"  {line}" for line in found)))
