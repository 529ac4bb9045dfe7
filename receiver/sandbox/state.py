"""One local Clipia: its switches, its dice and its records, for all endpoints."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from receiver.sandbox.options import Dice, SandboxOptions
from receiver.sandbox.records import Records

Clock = Callable[[], float]
"""Returns the time in unix seconds."""


class Sandbox:
    """The state of one local Clipia; `secret` signs its webhooks."""

    def __init__(self, options: SandboxOptions, *, secret: str, clock: Clock) -> None:
        self.secret: Final = secret
        self.clock: Final = clock
        self._start: Final = options
        self.reset()

    def reset(self) -> None:
        """Delete all records and restore the first switches."""
        self.options = self._start
        self.dice = Dice(self.options.seed)
        self.records = Records()

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set some switches; a new seed restarts the dice.

        Raises `SettingsError` without changing any switch.
        """
        self.options = self.options.changed(changes)
        if "seed" in changes:
            self.dice = Dice(self.options.seed)

    def hit(self, switch: str) -> bool:
        """Return whether a switch with a rate strikes now."""
        return self.dice.hit(switch, getattr(self.options, switch))
