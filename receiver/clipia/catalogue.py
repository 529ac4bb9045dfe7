"""Clipia's models, prices and account, asked for within the limits and remembered for a while."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

import structlog

from receiver.clipia.client import Call, ClipiaClient
from receiver.clipia.job_request import encode, join_warnings
from receiver.core.input_schema import Misfit, check_input
from receiver.db import accounts
from receiver.db.database import Database
from receiver.errors import ClipiaUnavailable, RequestError
from receiver.settings import InputCheck

MODEL_CACHE_SECONDS: Final = 600.0
"""Seconds for which models are remembered; an older one serves while Clipia is away."""
RECHECK_AGE_SECONDS: Final = 60.0
"""Age in seconds from which a model is asked for again before an input is refused: it may take it by now."""
PRICE_CACHE_SECONDS: Final = 60.0
"""Seconds for which an estimate is remembered."""
FAILURE_CACHE_SECONDS: Final = 30.0
"""Seconds after a question that was not answered in which it is not asked again."""
MAX_QUOTA_WAIT_SECONDS: Final = 5.0
"""Seconds that a question waits for its turn within the limits."""
CHECK_TIMEOUT_SECONDS: Final = 5.0
"""Seconds that a submission waits for the catalogue."""
MAX_CACHE_ENTRIES: Final = 1000

T = TypeVar("T")

log = structlog.get_logger()


class _Memory:
    """Answers by their question. Whoever asks what somebody asks already waits for that answer."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[float, Any]] = {}
        self._failures: dict[str, tuple[float, ClipiaUnavailable]] = {}
        self._asking: dict[str, asyncio.Task[Any]] = {}

    async def recall(
        self, question: str, ask: Callable[[], Awaitable[T]], *, fresh: float, or_older: bool = True
    ) -> T:
        """Return an answer that is not older than `fresh` seconds.

        While Clipia is away it may be `or_older`.
        """
        asked_at, older = self._answers.get(question, (float("-inf"), None))
        if time.monotonic() - asked_at < fresh:
            known: T = older
            return known
        task = self._asking.get(question)
        if task is None:
            task = asyncio.create_task(self._ask(question, ask), name="question to Clipia")
            self._asking[question] = task
            task.add_done_callback(partial(self._asked, question))
        try:
            # Shielded: the answer is the others', too, and worth remembering for nobody.
            answer: T = await asyncio.shield(task)
        except ClipiaUnavailable:
            if not or_older or question not in self._answers:
                raise
            stale: T = older
            return stale
        return answer

    def _asked(self, question: str, task: asyncio.Task[Any]) -> None:
        del self._asking[question]
        if not task.cancelled():
            task.exception()  # looked at, so that asyncio does not report what nobody waited for

    async def _ask(self, question: str, ask: Callable[[], Awaitable[T]]) -> T:
        failed_at, failure = self._failures.get(question, (float("-inf"), None))
        if failure is not None and time.monotonic() - failed_at < FAILURE_CACHE_SECONDS:
            raise _again(failure, after=time.monotonic() - failed_at)
        try:
            answer = await ask()
        except ClipiaUnavailable as error:
            # A copy: the error holds on to its traceback, and that to the whole input.
            self._remember(self._failures, question, _again(error, after=0.0))
            raise
        self._failures.pop(question, None)
        self._remember(self._answers, question, answer)
        return answer

    def _remember(self, where: dict[str, tuple[float, Any]], question: str, value: Any) -> None:
        where.pop(question, None)
        where[question] = (time.monotonic(), value)
        if len(where) > MAX_CACHE_ENTRIES:
            del where[next(iter(where))]


def _again(error: ClipiaUnavailable, *, after: float) -> ClipiaUnavailable:
    """Return the same error, `after` seconds later."""
    return type(error)(
        str(error),
        reason=error.reason,
        status=error.status,
        may_have_arrived=error.may_have_arrived,
        retry_after=None if error.retry_after is None else max(0.0, error.retry_after - after),
    )


class Catalogue:
    """What Clipia offers. Every method raises RequestError, ClipiaUnavailable and DatabaseUnavailable."""

    def __init__(self, database: Database, client: ClipiaClient, *, input_check: InputCheck = "on") -> None:
        self._database = database
        self._client = client
        self._input_check = input_check
        self._memory = _Memory()

    async def models(self) -> list[dict[str, Any]]:
        """Return the list of models."""
        return await self._memory.recall(
            "models", partial(self._ask, self._client.models), fresh=MODEL_CACHE_SECONDS
        )

    async def model(self, slug: str, *, fresh: float = MODEL_CACHE_SECONDS) -> dict[str, Any]:
        """Return one model with its `input_schema`, not older than `fresh` seconds if Clipia answers."""
        _refuse_path(slug)
        ask = partial(self._ask, partial(self._client.model, slug))
        return await self._memory.recall(f"model {slug}", ask, fresh=fresh)

    async def check(
        self, slug: str, given: Mapping[str, Any], *, strict: bool | None = None
    ) -> list[dict[str, Any]]:
        """Return warnings of keys that the model's schema does not have; Clipia takes them all the same.

        Raises RequestError for a model that does not exist and for an input that it would refuse; if `strict`
        (None: as the settings say), for those keys, too. While Clipia is away an unknown model passes.
        """
        strict = self._input_check == "strict" if strict is None else strict
        if self._input_check == "off" and not strict:
            return []
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                misfits = await self._misfits(slug, given, fresh=MODEL_CACHE_SECONDS)
                if misfits:
                    misfits = await self._misfits(slug, given, fresh=RECHECK_AGE_SECONDS)
        except (ClipiaUnavailable, TimeoutError) as error:
            log.warning("input not checked", model=slug, reason=getattr(error, "reason", "timeout"))
            return []
        if any(strict or not misfit.unknown for misfit in misfits):
            # All of them: a key that is not known may be the one that is missing, with a typo.
            message = " ".join(misfit.message for misfit in misfits[:5])
            raise RequestError(message, code="model_input_invalid")
        return [
            {"code": "unknown_parameter", "parameter": misfit.parameter, "message": misfit.message}
            for misfit in misfits
        ]

    async def estimate_checked(
        self, slug: str, given: Mapping[str, Any], *, strict: bool | None = None
    ) -> dict[str, Any]:
        """Return the price of an input that `check` lets pass, with the warnings of both."""
        ours = await self.check(slug, given, strict=strict)
        answer = await self.estimate(slug, given)
        clipias = answer.get("warnings")
        return answer | {"warnings": join_warnings(ours, clipias if isinstance(clipias, list) else [])}

    async def estimate(self, slug: str, given: Mapping[str, Any], *, or_older: bool = True) -> dict[str, Any]:
        """Return `{"credits", "warnings"}`, the price of an input.

        While Clipia is away it may be an older one if `or_older`.
        """
        _refuse_path(slug)
        # Its digest: an input may have a megabyte, and a thousand of them are remembered.
        question = f"price {slug} {hashlib.sha256(encode(dict(given))).hexdigest()}"
        ask = partial(self._ask, partial(self._client.estimate, slug, given))
        return await self._memory.recall(question, ask, fresh=PRICE_CACHE_SECONDS, or_older=or_older)

    async def balance(self) -> dict[str, Any]:
        """Return the account as it is now."""
        return await self._ask(self._client.balance)

    async def _misfits(self, slug: str, given: Mapping[str, Any], *, fresh: float) -> tuple[Misfit, ...]:
        model = await self.model(slug, fresh=fresh)
        return check_input(model.get("input_schema"), given)

    async def _ask(self, ask: Callable[..., Awaitable[T]]) -> T:
        """Make one call when it is its turn, and keep what the answer says about the limits."""
        account = self._client.account
        await self._take_turn(account)
        call = Call()
        throttled: ClipiaUnavailable | None = None
        try:
            return await ask(call=call)
        except ClipiaUnavailable as error:
            throttled = error if error.reason == "rate_limit_exceeded" else None
            raise
        finally:
            async with self._database.write() as connection:
                await accounts.learn(
                    connection,
                    account,
                    call.headers,
                    lambda quota, now: (
                        quota
                        if throttled is None
                        else quota.after_rate_limit(now, retry_after=throttled.retry_after)
                    ),
                )

    async def _take_turn(self, account: str) -> None:
        deadline = time.monotonic() + MAX_QUOTA_WAIT_SECONDS
        while True:
            async with self._database.write() as connection:
                quota, now = await accounts.lock(connection, account)
                wait = quota.query_delay(now)
                if not wait:
                    await accounts.save(connection, account, quota.after_calls("query", 1, now))
                    return
            if time.monotonic() + wait > deadline:
                raise ClipiaUnavailable(
                    "the share of Clipia's requests that questions have is used up for now",
                    reason="rate_limit_exceeded",
                    status=429,
                    may_have_arrived=False,
                    retry_after=wait,
                )
            await asyncio.sleep(wait)


def _refuse_path(slug: str) -> None:
    # It becomes a part of a path, where dots at its start would lead elsewhere.
    if slug.startswith("."):
        raise RequestError(f"There is no model {slug[:64]!r}.", code="model_not_found")
