"""The sandbox's memory: generations, accounts, idempotency keys and all submissions.

A generation's state is computed from the time, so a job makes progress without a task, and a test can change
the clock. Memory grows by a few KB per generation until the sandbox ends or is reset.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from receiver.sandbox.answers import Problem, retry_after

KEY_LIFETIME_SECONDS: Final = 24 * 3600.0
RATE_WINDOW_SECONDS: Final = 60.0
USAGE_SECONDS: Final = 30 * 24 * 3600.0
QUEUE_SHARE: Final = 0.25
"""The share of a generation's duration in the queue."""
QUEUE_LENGTH: Final = 3
TERMINAL: Final = frozenset({"COMPLETED", "FAILED", "CANCELED"})
FAILURE: Final = {"code": "GENERATION_FAILED", "message": "The model could not produce a result."}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt to send a webhook.

    `kind` is `result`, `duplicate`, `conflict` or `manual`; `number` counts the attempts of a webhook from 1.
    `at` is the start in unix seconds, and `seconds` is the duration. If there was no answer, `status_code` is
    None and `error` has the reason.
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
        """Whether the receiver answered 2xx."""
        return self.status_code is not None and self.status_code // 100 == 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A generation's state at one moment; `progress` is a percentage."""

    status: str
    queue_position: int | None = None
    """None outside of the queue."""
    progress: int = 100

    @property
    def terminal(self) -> bool:
        """Whether the state is final."""
        return self.status in TERMINAL


@dataclass(kw_only=True, eq=False)
class Generation:
    """One generation; only fields with a default change after the submission.

    Times are in unix seconds. `body` is the submission's raw body. `cost` is the price, charged or not.
    `submits` counts the submissions with its idempotency key.
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
        # A generation without a duration stays ended if the clock is set back.
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
        """Return its credits at `now`: reserved or charged, and 0 if refunded."""
        return self.cost if self.live and self.at(now).status not in ("FAILED", "CANCELED") else 0


class Account:
    """The generations and calls of one API key."""

    def __init__(self) -> None:
        self.generations: list[Generation] = []
        self._running: list[Generation] = []
        self._charged = 0
        self._window_start = -math.inf
        self._calls = 0

    def add(self, generation: Generation) -> None:
        """Add a new generation."""
        self.generations.append(generation)
        self._running.append(generation)

    def spent(self, now: float) -> int:
        """Return the credits reserved and charged so far."""
        running = self.running(now)
        return self._charged + sum(generation.due(now) for generation in running)

    def running(self, now: float) -> list[Generation]:
        """Return the generations in flight, and charge those that ended since the last call."""
        ended = [generation for generation in self._running if generation.at(now).terminal]
        if ended:
            self._charged += sum(generation.due(now) for generation in ended)
            self._running = [generation for generation in self._running if not generation.at(now).terminal]
        return self._running

    def usage(self, now: float) -> dict[str, int]:
        """Return the requests and credits of the last 30 days."""
        recent = [g for g in self.generations if g.created_at > now - USAGE_SECONDS]
        return {
            "requests": len(recent),
            "credits_spent": sum(g.due(now) for g in recent if g.at(now).terminal),
        }

    def count_call(self, now: float, limit: int) -> dict[str, str]:
        """Count an API call; return the RateLimit headers of its answer.

        Raises `Problem` if there were more than `limit` calls in the current minute.
        """
        if now >= self._window_start + RATE_WINDOW_SECONDS:
            self._window_start, self._calls = now, 0
        self._calls += 1
        reset = self._window_start + RATE_WINDOW_SECONDS - now
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
class Submission:
    """One POST to a model, refused or not; `status` is None until the answer."""

    at: float
    model: str
    idempotency_key: str | None
    body: bytes
    status: int | None = None
    request_id: str | None = None


@dataclass(kw_only=True, eq=False)
class KeyUse:
    """The use of an idempotency key: the first call makes the generation, and later calls find it."""

    fingerprint: bytes
    created_at: float
    generation: Generation | None = None
    in_progress: bool = True


class Records:
    """All records since the sandbox was started or reset."""

    def __init__(self) -> None:
        self.generations: dict[str, Generation] = {}
        self.submits: list[Submission] = []
        self._accounts: dict[str, Account] = {}
        self._key_uses: dict[tuple[str, str], KeyUse] = {}

    def account(self, api_key: str) -> Account:
        """Return the account of a key; it is made at the first call."""
        return self._accounts.setdefault(api_key, Account())

    def add(self, generation: Generation) -> None:
        """Add a new generation."""
        self.generations[generation.request_id] = generation
        self.account(generation.api_key).add(generation)

    def find(self, request_id: str) -> Generation:
        """Return a generation. Raises `Problem` if there is none."""
        try:
            return self.generations[request_id]
        except KeyError:
            raise Problem("not_found", f'There is no request "{request_id}".') from None

    @contextmanager
    def use_key(self, api_key: str, key: str | None, fingerprint: bytes, now: float) -> Iterator[KeyUse]:
        """Lock an idempotency key while its submission is processed.

        If the key was used before with the same parameters, the use has the generation. If the block makes
        no generation, the key stays unused. Raises `Problem` if the parameters differ, or if another call
        has locked the key.
        """
        use = KeyUse(fingerprint=fingerprint, created_at=now)
        if key is None:
            yield use
            return
        known = self._key_uses.get((api_key, key))
        if known is not None and now - known.created_at < KEY_LIFETIME_SECONDS:
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
        """Return the number of submissions and of generations for each idempotency key."""
        submits = Counter(s.idempotency_key for s in self.submits if s.idempotency_key is not None)
        made = Counter(g.idempotency_key for g in self.generations.values())
        return {key: {"submits": count, "generations": made[key]} for key, count in submits.items()}
