"""Clipia's models, prices and account: cached, and requested within the account's quota."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar, cast

import structlog

from receiver.clipia.client import Call, ClipiaClient, Estimate
from receiver.clipia.job_request import encode, join_warnings
from receiver.core.input_schema import InputProblem, check_input
from receiver.core.quota import Quota
from receiver.db import accounts
from receiver.db.database import Database
from receiver.errors import ClipiaUnavailable, RequestError
from receiver.setting_fields import InputCheck

MODEL_CACHE_SECONDS: Final = 600.0
"""A cached model is used for this long, and for longer while Clipia is unavailable."""
RECHECK_AGE_SECONDS: Final = 60.0
"""A cached model older than this is requested again if an input is invalid: it may have changed."""
PRICE_CACHE_SECONDS: Final = 60.0
"""An estimate is used for this long."""
FAILURE_CACHE_SECONDS: Final = 30.0
"""After a failed request, wait this long before the next one."""
MAX_QUOTA_WAIT_SECONDS: Final = 5.0
"""A request waits at most this long for the quota."""
CHECK_TIMEOUT_SECONDS: Final = 5.0
"""A submission waits at most this long for a model."""
MAX_CACHE_ENTRIES: Final = 1000

T = TypeVar("T")

log = structlog.get_logger()


class _Cache:
    """Answers of Clipia by key. Concurrent callers of one key share one request."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, Any]] = {}
        self._failures: dict[str, tuple[float, ClipiaUnavailable]] = {}
        self._requests: dict[str, asyncio.Task[Any]] = {}

    async def get(
        self, key: str, request: Callable[[], Awaitable[T]], *, max_age: float, or_older: bool = True
    ) -> T:
        """Return the answer for a key, requested again if it is older than `max_age` seconds.

        If the request fails, an older answer is returned, unless `or_older` is false.
        """
        answered_at, cached = self._answers.get(key, (float("-inf"), None))
        if time.monotonic() - answered_at < max_age:
            return cast("T", cached)
        task = self._requests.get(key)
        if task is None:
            task = asyncio.create_task(self._request(key, request), name="request to Clipia")
            self._requests[key] = task
            task.add_done_callback(partial(self._finish, key))
        try:
            # If this caller is cancelled, the request goes on: others wait for it, and the answer is cached.
            return cast("T", await asyncio.shield(task))
        except ClipiaUnavailable:
            if not or_older or key not in self._answers:
                raise
            return cast("T", cached)

    def _finish(self, key: str, task: asyncio.Task[Any]) -> None:
        del self._requests[key]
        if not task.cancelled():
            # If all callers were cancelled, asyncio would log an exception that was never retrieved.
            task.exception()

    async def _request(self, key: str, request: Callable[[], Awaitable[T]]) -> T:
        failed_at, failure = self._failures.get(key, (float("-inf"), None))
        if failure is not None and time.monotonic() - failed_at < FAILURE_CACHE_SECONDS:
            raise _copy(failure, after=time.monotonic() - failed_at)
        try:
            answer = await request()
        except ClipiaUnavailable as error:
            # The error itself would keep its traceback in memory, and the whole input with it.
            _store(self._failures, key, _copy(error, after=0.0))
            raise
        self._failures.pop(key, None)
        _store(self._answers, key, answer)
        return answer


def _store(entries: dict[str, tuple[float, T]], key: str, value: T) -> None:
    """Add an entry as the newest, and drop the oldest one if there are too many."""
    entries.pop(key, None)
    entries[key] = (time.monotonic(), value)
    if len(entries) > MAX_CACHE_ENTRIES:
        del entries[next(iter(entries))]


def _copy(error: ClipiaUnavailable, *, after: float) -> ClipiaUnavailable:
    """Return a copy of an error, as it stands `after` seconds later."""
    wait = None if error.retry_after is None else max(0.0, error.retry_after - after)
    reason, status, arrived = error.reason, error.status, error.may_have_arrived
    return type(error)(str(error), reason=reason, status=status, may_have_arrived=arrived, retry_after=wait)


class Catalogue:
    """Clipia's offer. All methods raise RequestError, ClipiaUnavailable and DatabaseUnavailable."""

    def __init__(self, database: Database, client: ClipiaClient, *, input_check: InputCheck = "on") -> None:
        self._database = database
        self._client = client
        self._input_check = input_check
        self._cache = _Cache()

    async def models(self) -> list[dict[str, Any]]:
        """Return all models, each as in Clipia's answer."""
        request = partial(self._call, self._client.models)
        return await self._cache.get("models", request, max_age=MODEL_CACHE_SECONDS)

    async def model(self, slug: str, *, max_age: float = MODEL_CACHE_SECONDS) -> dict[str, Any]:
        """Return one model with its `input_schema`; older than `max_age` only if Clipia is unavailable."""
        _check_slug(slug)
        request = partial(self._call, partial(self._client.model, slug))
        return await self._cache.get(f"model {slug}", request, max_age=max_age)

    async def check(
        self, slug: str, given: Mapping[str, Any], *, strict: bool | None = None
    ) -> list[dict[str, Any]]:
        """Return a warning for each key that is not in the model's schema. Clipia accepts these keys.

        Raises RequestError if the model does not exist or the input is invalid, and for unknown keys if
        `strict` (None: the setting decides). If Clipia is unavailable and the model is not cached, any input
        passes.
        """
        strict = self._input_check == "strict" if strict is None else strict
        if self._input_check == "off" and not strict:
            return []
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                problems = await self._find_problems(slug, given)
        except (ClipiaUnavailable, TimeoutError) as error:
            log.warning("input not checked", model=slug, reason=getattr(error, "reason", "timeout"))
            return []
        if any(strict or not problem.unknown for problem in problems):
            # Unknown keys too: one of them may be the missing parameter with a typo.
            message = " ".join(problem.message for problem in problems[:5])
            raise RequestError(message, code="model_input_invalid")
        return [
            {"code": "unknown_parameter", "parameter": problem.parameter, "message": problem.message}
            for problem in problems
        ]

    async def estimate_checked(
        self, slug: str, given: Mapping[str, Any], *, strict: bool | None = None
    ) -> Estimate:
        """Return the price of an input that passes `check`, with the warnings of both."""
        ours = await self.check(slug, given, strict=strict)
        answer = await self.estimate(slug, given)
        warnings = answer.get("warnings")
        return {**answer, "warnings": join_warnings(ours, warnings if isinstance(warnings, list) else [])}

    async def estimate(self, slug: str, given: Mapping[str, Any], *, or_older: bool = True) -> Estimate:
        """Return the price of an input. With `or_older`, an old one is used if Clipia is unavailable."""
        _check_slug(slug)
        # A digest, because an input may have a megabyte, and the cache holds a thousand.
        key = f"price {slug} {hashlib.sha256(encode(dict(given))).hexdigest()}"
        request = partial(self._call, partial(self._client.estimate, slug, given))
        return await self._cache.get(key, request, max_age=PRICE_CACHE_SECONDS, or_older=or_older)

    async def balance(self) -> dict[str, Any]:
        """Return the account, which is never cached."""
        return await self._call(self._client.balance)

    async def _find_problems(self, slug: str, given: Mapping[str, Any]) -> tuple[InputProblem, ...]:
        problems = check_input((await self.model(slug)).get("input_schema"), given)
        if problems:
            model = await self.model(slug, max_age=RECHECK_AGE_SECONDS)
            problems = check_input(model.get("input_schema"), given)
        return problems

    async def _call(self, method: Callable[..., Awaitable[T]]) -> T:
        """Call Clipia once the quota allows it, and update the quota from the answer."""
        account = self._client.account
        await self._wait_for_quota(account)
        call = Call()
        throttled: ClipiaUnavailable | None = None

        def change(quota: Quota, now: float) -> Quota:
            return quota.after_rate_limit(now, retry_after=throttled.retry_after) if throttled else quota

        try:
            return await method(call=call)
        except ClipiaUnavailable as error:
            throttled = error if error.reason == "rate_limit_exceeded" else None
            raise
        finally:
            async with self._database.write() as connection:
                await accounts.learn(connection, account, call.headers, change)

    async def _wait_for_quota(self, account: str) -> None:
        deadline = time.monotonic() + MAX_QUOTA_WAIT_SECONDS
        while True:
            async with self._database.write() as connection:
                quota, now = await accounts.lock(connection, account)
                wait = quota.query_delay(now)
                if not wait:
                    await accounts.save(connection, account, quota.after_calls("query", 1, now))
                    return
            if time.monotonic() + wait > deadline:
                message = "the quota for catalogue requests to Clipia is used up for now"
                reason = "rate_limit_exceeded"
                raise ClipiaUnavailable(
                    message, reason=reason, status=429, may_have_arrived=False, retry_after=wait
                )
            await asyncio.sleep(wait)


def _check_slug(slug: str) -> None:
    # A slug becomes a segment of the path; dots at its start could lead to another path.
    if slug.startswith("."):
        raise RequestError(f"There is no model {slug[:64]!r}.", code="model_not_found")
