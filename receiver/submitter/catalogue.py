"""Clipia's models, prices and account, asked for within the limits and remembered for a while."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import structlog

from receiver.clipia import Call, ClipiaClient
from receiver.db import accounts
from receiver.db.engine import Database
from receiver.errors import ClipiaUnavailable, Refused
from receiver.inputs import Misfit, check_input

FRESH: Final = 600.0
"""Seconds for which a model is remembered; an older one serves while Clipia is away."""
RECHECK: Final = 60.0
"""Age in seconds from which a model is asked for again before an input is refused: it may take it by now."""

T = TypeVar("T")

log = structlog.get_logger()


class Catalogue:
    """What Clipia offers. Every method raises Refused, ClipiaUnavailable and DatabaseUnavailable."""

    def __init__(self, database: Database, client: ClipiaClient) -> None:
        self._database = database
        self._client = client
        self._models: dict[str, tuple[float, dict[str, Any]]] = {}
        self._asking = asyncio.Lock()

    async def models(self) -> list[dict[str, Any]]:
        """Return the list of models."""
        return await self._ask(lambda call: self._client.models(call=call))

    async def model(self, slug: str, *, fresh: float = FRESH) -> dict[str, Any]:
        """Return one model with its `input_schema`, not older than `fresh` seconds if Clipia answers."""
        # One question at a time: the first of a burst of jobs asks for all of them.
        async with self._asking:
            known = self._models.get(slug)
            if known is not None and time.monotonic() - known[0] < fresh:
                return known[1]
            try:
                model = await self._ask(lambda call: self._client.model(slug, call=call))
            except ClipiaUnavailable:
                if known is None:
                    raise
                return known[1]
            self._models[slug] = (time.monotonic(), model)
            return model

    async def check(self, slug: str, given: Mapping[str, Any]) -> None:
        """Raise Refused for a model that there is not, or an input that it would refuse or ignore parts of.

        While Clipia is away an unknown model is not held against the job.
        """
        try:
            misfits = await self._misfits(slug, given, fresh=FRESH)
            if misfits:
                misfits = await self._misfits(slug, given, fresh=RECHECK)
        except ClipiaUnavailable as error:
            log.warning("input not checked", model=slug, reason=error.reason)
            return
        if misfits:
            message = " ".join(misfit.message for misfit in misfits[:5])
            raise Refused(message, code="model_input_invalid", status=400)

    async def estimate(self, slug: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return `{"credits", "warnings"}`, the price of an input."""
        return await self._ask(lambda call: self._client.estimate(slug, given, call=call))

    async def balance(self) -> dict[str, Any]:
        """Return the account."""
        return await self._ask(lambda call: self._client.balance(call=call))

    async def _misfits(self, slug: str, given: Mapping[str, Any], *, fresh: float) -> tuple[Misfit, ...]:
        model = await self.model(slug, fresh=fresh)
        return check_input(model.get("input_schema"), given)

    async def _ask(self, ask: Callable[[Call], Awaitable[T]]) -> T:
        """Make one call, unless the account may make none now, and keep what it says about the limits."""
        account = self._client.account
        async with self._database.write() as connection:
            limits, now = await accounts.lock(connection, account)
            wait = limits.calls_after - now
            if wait <= 0:
                await accounts.save(connection, account, limits.taking("submit", 1, now))
        if wait > 0:
            raise ClipiaUnavailable(
                "Clipia's limit of requests is used up",
                reason="rate_limit_exceeded",
                status=429,
                may_have_arrived=False,
                retry_after=wait,
            )
        call = Call()
        failure: ClipiaUnavailable | None = None
        try:
            return await ask(call)
        except ClipiaUnavailable as error:
            failure = error
            raise
        finally:
            async with self._database.write() as connection:
                limits, now = await accounts.lock(connection, account)
                learned = limits.reading(call.headers, now)
                if failure is not None and failure.reason == "rate_limit_exceeded":
                    learned = learned.throttled(now, retry_after=failure.retry_after)
                if learned != limits:
                    await accounts.save(connection, account, learned)
