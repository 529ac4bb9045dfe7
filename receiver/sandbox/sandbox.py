"""The state that the sandbox's parts share."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from receiver.sandbox.options import Dice, SandboxOptions
from receiver.sandbox.records import Records

Clock = Callable[[], float]
"""Returns the time in unix seconds."""


class Sandbox:
    """Switches, dice and memory of one local Clipia; `secret` signs its webhooks."""

    def __init__(self, options: SandboxOptions, *, secret: str, clock: Clock) -> None:
        self.secret: Final = secret
        self.clock: Final = clock
        self._start: Final = options
        self.reset()

    def reset(self) -> None:
        """Forget everything and go back to the switches that it was started with."""
        self.options = self._start
        self.dice = Dice(self.options.seed)
        self.records = Records()

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set some switches; a seed starts the dice afresh.

        Raises `SettingsError`, and then changes nothing.
        """
        self.options = self.options.changed(changes)
        if "seed" in changes:
            self.dice = Dice(self.options.seed)

    def hit(self, switch: str) -> bool:
        """Throw the dice for a switch with a rate."""
        return self.dice.hit(switch, getattr(self.options, switch))
