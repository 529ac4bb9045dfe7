"""What the sandbox remembers: generations, accounts, idempotency keys and every submit it was sent.

A generation's state is not stored but follows from the time, so nothing has to run for a job to make progress
and a test can turn the clock. Nothing is ever dropped: memory grows by a few KB per generation until the
sandbox ends or is reset.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from receiver.sandbox.answers import Problem, retry_after

KEY_LIFETIME: Final = 24 * 3600.0
WINDOW: Final = 60.0
USAGE_PERIOD: Final = 30 * 24 * 3600.0
QUEUE_SHARE: Final = 0.25
"""The part of a generation's duration that it waits in the queue."""
QUEUE_LENGTH: Final = 3
TERMINAL: Final = frozenset({"COMPLETED", "FAILED", "CANCELED"})
FAILURE: Final = {"code": "GENERATION_FAILED", "message": "The model could not produce a result."}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at sending a webhook.

    `kind` is `result`, `duplicate`, `conflict` or `manual`; `number` counts the tries of one webhook from 1;
    `at` is in unix seconds and `seconds` is how long it took. `status_code` is None where no answer came:
    `error` says why.
    """

    kind: str
    webhook_id: str
    number: int
    at: float
    seconds: float
    status_code: int | None
    error: str | None

    @property
    def accepted(self) -> bool:
        """Whether the receiver said 2xx."""
        return self.status_code is not None and self.status_code // 100 == 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A generation's state at one moment; `progress` is in per cent."""

    status: str
    queue_position: int | None = None
    """None unless it waits in the queue."""
    progress: int = 100

    @property
    def terminal(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in TERMINAL


@dataclass(kw_only=True, eq=False)
class Generation:
    """One generation; only what has a default changes after it was submitted.

    Times are in unix seconds. `body` is the submit's body as received; `cost` is the price, charged or not;
    `submits` counts the calls that were led to it.
    """

    request_id: str
    api_key: str
    live: bool
    model: str
    cost: int
    output: dict[str, Any]
    warnings: list[dict[str, str]]
    fails: bool
    origin: str
    webhook_url: str | None
    idempotency_key: str | None
    body: bytes
    created_at: float
    duration: float
    submits: int = 0
    canceled_at: float | None = None
    webhook_lost: bool = False
    attempts: list[Attempt] = field(default_factory=list)

    def at(self, now: float) -> Progress:
        """Return its state at `now`."""
        if self.canceled_at is not None:
            return Progress(status="CANCELED", progress=0)
        # An instant generation stays done when the clock is set back.
        if not self.duration or now >= self.ended_at():
            return Progress(status="FAILED" if self.fails else "COMPLETED")
        done = (now - self.created_at) / self.duration
        if done < QUEUE_SHARE:
            position = math.ceil(QUEUE_LENGTH * (1 - done / QUEUE_SHARE))
            return Progress(status="IN_QUEUE", queue_position=position, progress=0)
        return Progress(status="IN_PROGRESS", progress=int(100 * (done - QUEUE_SHARE) / (1 - QUEUE_SHARE)))

    def ended_at(self) -> float:
        """Return when it ended or will end."""
        return self.created_at + self.duration if self.canceled_at is None else self.canceled_at

    def due(self, now: float) -> int:
        """Return the credits of the account that it holds at `now`: reserved, charged, or refunded (0)."""
        return self.cost if self.live and self.at(now).status not in ("FAILED", "CANCELED") else 0


class Account:
    """What one API key has used."""

    def __init__(self) -> None:
        self.generations: list[Generation] = []
        self._running: list[Generation] = []
        self._settled = 0
        self._window_start = -math.inf
        self._calls = 0

    def add(self, generation: Generation) -> None:
        """Take on a new generation."""
        self.generations.append(generation)
        self._running.append(generation)

    def spent(self, now: float) -> int:
        """Return the credits reserved and charged so far."""
        running = self.running(now)
        return self._settled + sum(generation.due(now) for generation in running)

    def running(self, now: float) -> list[Generation]:
        """Return the generations in flight; those that have ended since the last call are settled."""
        ended = [generation for generation in self._running if generation.at(now).terminal]
        if ended:
            self._settled += sum(generation.due(now) for generation in ended)
            self._running = [generation for generation in self._running if not generation.at(now).terminal]
        return self._running

    def usage(self, now: float) -> dict[str, int]:
        """Return the requests and credits of the last 30 days."""
        recent = [g for g in self.generations if g.created_at > now - USAGE_PERIOD]
        return {
            "requests": len(recent),
            "credits_spent": sum(g.due(now) for g in recent if g.at(now).terminal),
        }

    def count_call(self, now: float, limit: int) -> dict[str, str]:
        """Count an API call; return the RateLimit headers of its answer.

        Raises `Problem` where the call is over `limit` in the present minute.
        """
        if now >= self._window_start + WINDOW:
            self._window_start, self._calls = now, 0
        self._calls += 1
        reset = self._window_start + WINDOW - now
        headers = {
            "RateLimit-Limit": str(limit),
            "RateLimit-Remaining": str(max(0, limit - self._calls)),
            "RateLimit-Reset": str(math.ceil(reset)),
        }
        if self._calls > limit:
            message = "Too many requests in this minute."
            raise Problem("rate_limit_exceeded", message, headers=headers | retry_after(reset, now=now))
        return headers


@dataclass(kw_only=True, eq=False)
class Submit:
    """One POST to a model, refused or not; `status` stays None until it is answered."""

    at: float
    model: str
    idempotency_key: str | None
    body: bytes
    status: int | None = None
    request_id: str | None = None

    @property
    def body_sha256(self) -> str:
        """The checksum of the body as received, in hex."""
        return hashlib.sha256(self.body).hexdigest()


@dataclass(kw_only=True, eq=False)
class KeyUse:
    """One use of an idempotency key: the first call makes the generation, later ones find it."""

    fingerprint: bytes
    created_at: float
    generation: Generation | None = None
    in_progress: bool = True


class Records:
    """Everything that happened since the sandbox was started or reset."""

    def __init__(self) -> None:
        self.generations: dict[str, Generation] = {}
        self.submits: list[Submit] = []
        self._accounts: dict[str, Account] = {}
        self._key_uses: dict[tuple[str, str], KeyUse] = {}

    def account(self, api_key: str) -> Account:
        """Return the account of a key, a new one at first sight."""
        return self._accounts.setdefault(api_key, Account())

    def add(self, generation: Generation) -> None:
        """Record a new generation."""
        self.generations[generation.request_id] = generation
        self.account(generation.api_key).add(generation)

    def find(self, request_id: str) -> Generation:
        """Return a generation; raises `Problem` where there is none."""
        try:
            return self.generations[request_id]
        except KeyError:
            raise Problem("not_found", f'There is no request "{request_id}".') from None

    @contextmanager
    def use_key(self, api_key: str, key: str | None, fingerprint: bytes, now: float) -> Iterator[KeyUse]:
        """Hold an idempotency key while its submit is processed.

        The use has a generation already where the key has been used with the same parameters. A submit
        that makes none leaves the key unused. Raises `Problem` for other parameters or while another call
        holds it.
        """
        use = KeyUse(fingerprint=fingerprint, created_at=now)
        if key is None:
            yield use
            return
        known = self._key_uses.get((api_key, key))
        if known is not None and now - known.created_at < KEY_LIFETIME:
            if known.fingerprint != fingerprint:
                raise Problem("idempotency_key_reuse", "This Idempotency-Key was used with other parameters.")
            if known.in_progress:
                raise Problem(
                    "request_in_progress", "The first request with this Idempotency-Key is being processed."
                )
            use = known
        self._key_uses[api_key, key] = use
        use.in_progress = True
        try:
            yield use
        finally:
            use.in_progress = False
            if use.generation is None:
                del self._key_uses[api_key, key]

    def keys(self) -> dict[str, dict[str, int]]:
        """Return for every idempotency key how many submits carried it and how many generations it made."""
        submits = Counter(s.idempotency_key for s in self.submits if s.idempotency_key is not None)
        made = Counter(g.idempotency_key for g in self.generations.values())
        return {key: {"submits": count, "generations": made[key]} for key, count in submits.items()}
