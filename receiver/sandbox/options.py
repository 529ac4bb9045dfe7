"""The sandbox's switches, and the dice that decide when a switch with a rate applies."""

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Annotated, Any, Final, Self, get_type_hints

from receiver.errors import SettingsError
from receiver.sandbox.answers import CODES

SMALLEST_VIDEO: Final = 65_536
"""The least that `video_bytes` may ask for: enough for the sample and its padding."""


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What belongs to a field of `SandboxOptions` besides its type and its default.

    `help` is one line for people; a number must lie between `low` and `high`, bounds included.
    """

    help: str
    low: float = 0
    high: float = math.inf


@dataclass(frozen=True, kw_only=True)
class SandboxOptions:
    """How the sandbox behaves; the defaults are a Clipia that never fails.

    A field's line is its `Switch.help` (`switches()` gives them all). Names that end in `_rate` are fractions
    from 0 (never) to 1 (always), times are in seconds. The limits are
    Clipia's; no client reaches those of `WITHOUT_LIMITS`. Raises `SettingsError` for a value out of bounds.
    """

    seed: Annotated[int, Switch(help="seed of every random choice")] = 0
    duration: Annotated[float, Switch(help="how long a live generation takes, in seconds")] = 3.0
    credits: Annotated[int, Switch(help="credits that every account has to spend")] = 100_000
    rate_limit: Annotated[int, Switch(help="API calls per key and minute before 429", low=1)] = 120
    concurrency_limit: Annotated[int, Switch(help="generations in flight per key before 429", low=1)] = 10

    latency: Annotated[float, Switch(help="seconds that every API answer is held back")] = 0.0
    throttle_rate: Annotated[float, Switch(help="share of API calls answered 429", high=1)] = 0.0
    error_rate: Annotated[float, Switch(help="share of API calls answered 5xx, nothing done", high=1)] = 0.0
    retry_after: Annotated[int, Switch(help="Retry-After of ordered 429 answers, in seconds")] = 1
    retry_after_date: Annotated[bool, Switch(help="send Retry-After as an HTTP date")] = False
    refuse_submits: Annotated[str, Switch(help="error code that answers every submit")] = ""
    lost_answer_rate: Annotated[float, Switch(help="share of submits done but answered 504", high=1)] = 0.0
    fail_rate: Annotated[float, Switch(help="share of generations that fail", high=1)] = 0.0

    webhook_attempts: Annotated[int, Switch(help="attempts per webhook", low=1, high=20)] = 6
    webhook_backoff: Annotated[float, Switch(help="seconds before the second attempt, then doubled")] = 1.0
    webhook_timeout: Annotated[float, Switch(help="seconds that a receiver has to answer", low=0.001)] = 10.0
    webhook_first: Annotated[bool, Switch(help="deliver the webhook, then answer the submit")] = False
    webhook_loss_rate: Annotated[float, Switch(help="share of webhooks never sent", high=1)] = 0.0
    webhook_duplicate_rate: Annotated[float, Switch(help="share of webhooks sent twice", high=1)] = 0.0
    webhook_conflict_rate: Annotated[
        float, Switch(help="share of webhooks contradicted by another", high=1)
    ] = 0.0

    media_latency: Annotated[float, Switch(help="seconds before a download starts")] = 0.0
    media_missing_rate: Annotated[float, Switch(help="share of downloads answered 404", high=1)] = 0.0
    media_truncate_rate: Annotated[float, Switch(help="share of downloads cut off half-way", high=1)] = 0.0
    video_bytes: Annotated[int, Switch(help="size of new videos; 0 is the sample as it is")] = 0

    def __post_init__(self) -> None:
        for name, (kind, switch) in switches().items():
            _check(name, getattr(self, name), kind, switch)
        if self.refuse_submits and self.refuse_submits not in CODES:
            raise SettingsError(f"refuse_submits must be empty or one of: {', '.join(CODES)}")
        if 0 < self.video_bytes < SMALLEST_VIDEO:
            raise SettingsError(f"video_bytes must be 0 or at least {SMALLEST_VIDEO}")

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with `changes` applied; raises `SettingsError` for an unknown name or a bad value."""
        if unknown := sorted(changes.keys() - switches().keys()):
            raise SettingsError(f"unknown switch {unknown[0]!r}; there are: {', '.join(switches())}")
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Return every switch with its value, ready for JSON."""
        return asdict(self)


WITHOUT_LIMITS: Final[Mapping[str, Any]] = {"rate_limit": 1_000_000, "concurrency_limit": 1_000_000}
"""Values of the two limits that no client reaches; every answer still has the `RateLimit-*` headers."""


@cache
def switches() -> Mapping[str, tuple[type, Switch]]:
    """Return each field's type and `Switch`, in the order of `SandboxOptions`."""
    hints = get_type_hints(SandboxOptions, include_extras=True)
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()}


def _check(name: str, value: object, kind: type, switch: Switch) -> None:
    # True is an int in Python, but whoever writes true for a number meant something else.
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or isinstance(value, bool) is not (kind is bool):
        raise SettingsError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    if isinstance(value, int | float) and not (math.isfinite(value) and switch.low <= value <= switch.high):
        limits = (
            f"at least {switch.low:g}"
            if switch.high == math.inf
            else f"from {switch.low:g} to {switch.high:g}"
        )
        raise SettingsError(f"{name} must be {limits}, not {value}")


class Dice:
    """Seeded chance, with a generator per switch: turning one fault on moves no other one."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[str, random.Random] = {}

    def hit(self, switch: str, rate: float) -> bool:
        """Say whether the fault called `switch` strikes now; exact at rates 0 and 1."""
        return self._generator(switch).random() < rate

    def choice(self, switch: str, among: tuple[str, ...]) -> str:
        """Pick one of `among`."""
        return self._generator(switch).choice(among)

    def _generator(self, switch: str) -> random.Random:
        if switch not in self._generators:
            self._generators[switch] = random.Random(f"{self._seed}:{switch}")  # noqa: S311 - chance, not secrets
        return self._generators[switch]
