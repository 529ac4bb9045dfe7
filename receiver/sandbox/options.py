"""The sandbox's switches, and the dice that decide whether a switch with a rate strikes."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Final, Self, get_type_hints

from receiver.errors import SettingsError
from receiver.sandbox.answers import CODES

SMALLEST_VIDEO_BYTES: Final = 65_536
"""The smallest `video_bytes`: the sample and the head of its padding."""


@dataclass(frozen=True, kw_only=True)
class Switch:
    """The help and the bounds of a field of `SandboxOptions`; both bounds are allowed values."""

    help: str
    low: float = 0
    high: float = math.inf


@dataclass(frozen=True, kw_only=True)
class SandboxOptions:
    """The switches; by default the sandbox is a Clipia that never fails.

    `Switch.help` explains each field. Names that end in `_rate` are fractions from 0 (never) to 1 (always),
    and times are in seconds. The default limits are Clipia's own. Raises `SettingsError` for a value out of
    bounds.
    """

    seed: Annotated[int, Switch(help="seed of every random choice")] = 0
    duration: Annotated[float, Switch(help="how long a live generation takes, in seconds")] = 3.0
    credits: Annotated[int, Switch(help="credits that every account has to spend")] = 100_000
    rate_limit: Annotated[int, Switch(help="API calls per key and minute before 429", low=1)] = 120
    concurrency_limit: Annotated[int, Switch(help="generations in flight per key before 429", low=1)] = 10

    latency: Annotated[float, Switch(help="seconds that every API answer is delayed")] = 0.0
    throttle_rate: Annotated[float, Switch(help="share of API calls answered 429", high=1)] = 0.0
    error_rate: Annotated[float, Switch(help="share of API calls answered 5xx without effect", high=1)] = 0.0
    retry_after: Annotated[int, Switch(help="Retry-After of ordered 429 answers, in seconds")] = 1
    retry_after_date: Annotated[bool, Switch(help="send Retry-After as an HTTP date")] = False
    refuse_submits: Annotated[str, Switch(help="error code that answers every submission")] = ""
    lost_answer_rate: Annotated[float, Switch(help="share of submissions done but answered 504", high=1)] = (
        0.0
    )
    fail_rate: Annotated[float, Switch(help="share of generations that fail", high=1)] = 0.0

    webhook_attempts: Annotated[int, Switch(help="attempts per webhook", low=1, high=20)] = 6
    webhook_backoff: Annotated[float, Switch(help="seconds before the second attempt, then doubled")] = 1.0
    webhook_timeout: Annotated[float, Switch(help="seconds that a receiver has to answer", low=0.001)] = 10.0
    webhook_first: Annotated[bool, Switch(help="send the webhook before the submission's answer")] = False
    webhook_loss_rate: Annotated[float, Switch(help="share of webhooks never sent", high=1)] = 0.0
    webhook_duplicate_rate: Annotated[float, Switch(help="share of webhooks sent twice", high=1)] = 0.0
    webhook_conflict_rate: Annotated[
        float, Switch(help="share of webhooks contradicted by another", high=1)
    ] = 0.0

    media_latency: Annotated[float, Switch(help="seconds before a download starts")] = 0.0
    media_missing_rate: Annotated[float, Switch(help="share of downloads answered 404", high=1)] = 0.0
    media_truncate_rate: Annotated[float, Switch(help="share of downloads cut in the middle", high=1)] = 0.0
    video_bytes: Annotated[int, Switch(help="size of new videos; 0 is the sample's own")] = 0

    def __post_init__(self) -> None:
        for name, (kind, switch) in switches().items():
            _check(name, getattr(self, name), kind, switch)
        if self.refuse_submits and self.refuse_submits not in CODES:
            raise SettingsError(f"refuse_submits must be empty or one of: {', '.join(CODES)}")
        if 0 < self.video_bytes < SMALLEST_VIDEO_BYTES:
            raise SettingsError(f"video_bytes must be 0 or at least {SMALLEST_VIDEO_BYTES}")

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with `changes`. Raises `SettingsError` for an unknown name or an invalid value."""
        if unknown := sorted(changes.keys() - switches().keys()):
            raise SettingsError(f"unknown switch {unknown[0]!r}; there are: {', '.join(switches())}")
        return replace(self, **changes)


WITHOUT_LIMITS: Final[Mapping[str, Any]] = {"rate_limit": 1_000_000, "concurrency_limit": 1_000_000}
"""Limits that no client reaches; the answers still have the `RateLimit-*` headers."""


@cache
def switches() -> Mapping[str, tuple[type, Switch]]:
    """Return each field's type and `Switch`, in the order of `SandboxOptions`."""
    hints = get_type_hints(SandboxOptions, include_extras=True)
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()}


def _check(name: str, value: object, kind: type, switch: Switch) -> None:
    # In Python True is an int, but `true` for a number is a mistake.
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or isinstance(value, bool) is not (kind is bool):
        raise SettingsError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    low, high = switch.low, switch.high
    if isinstance(value, int | float) and not (math.isfinite(value) and low <= value <= high):
        limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise SettingsError(f"{name} must be {limits}, not {value}")


class Dice:
    """Seeded random choices. Each switch has a generator, so it does not change the choices of others."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[str, random.Random] = {}

    def hit(self, switch: str, rate: float) -> bool:
        """Return whether the fault `switch` strikes now: never at rate 0, always at rate 1."""
        return self._generator(switch).random() < rate

    def choice(self, switch: str, among: tuple[str, ...]) -> str:
        """Pick one of `among`."""
        return self._generator(switch).choice(among)

    def _generator(self, switch: str) -> random.Random:
        if switch not in self._generators:
            self._generators[switch] = random.Random(f"{self._seed}:{switch}")  # noqa: S311 - chance, not secrets
        return self._generators[switch]
