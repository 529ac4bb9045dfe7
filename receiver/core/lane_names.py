"""Names of the lanes, as signals, presence and metrics use them."""

from collections.abc import Callable
from typing import Final

FAN_OUT_LANE: Final = "fanout"
MEDIA_LANE: Final = "media"
REPLAY_LANE: Final = "replay"
SUBMIT_LANE: Final = "submit"
POLL_LANE: Final = "poll"
RETENTION_LANE: Final = "retention"
DESTINATION_STATES: Final = "destinations"
"""No lane: its signal says that an operator has paused or resumed a destination."""

Wake = Callable[[str], None]
"""Tells a lane, by its name, that it may have work."""


def destination_lane(name: str) -> str:
    """Return the name of a destination's lane."""
    return f"destination:{name}"


def alert_lane(name: str) -> str:
    """Return the name of the lane that sends alerts to a destination."""
    return f"alerts:{name}"


def wake_no_lane(_lane: str) -> None:
    """Do not wake the lane: it finds its work when it polls."""
