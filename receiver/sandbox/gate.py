"""The checks of every API call: its key, the rate limit, and the faults that the switches order."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from receiver.sandbox.answers import CODES, Problem, retry_after
from receiver.sandbox.state import Sandbox

Endpoint = Callable[[Request], Awaitable[Response]]
Handler = Callable[[Request, str], Awaitable[Response]]
"""Answers a request that has passed the checks; the second argument is its API key."""

ERRORS: Final = ("500 internal_error", *(f"{status} service_unavailable" for status in (502, 503, 504)))

_API_KEY = re.compile(r"clipia_(test|live)_[A-Za-z0-9_-]{1,200}")


class Gate:
    """Checks each request before its handler."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def guard(self, handler: Handler) -> Endpoint:
        """Make an endpoint of a handler; its answers are delayed by `latency`."""

        async def endpoint(request: Request) -> Response:
            response = await self.answer(request, handler)
            await asyncio.sleep(self._sandbox.options.latency)
            return response

        return endpoint

    async def answer(self, request: Request, handler: Handler) -> Response:
        """Answer with the handler, or with an error if a check fails; both with RateLimit headers."""
        key = api_key_of(request)
        headers: dict[str, str] = {}
        try:
            # All calls without a valid key share one limit.
            account = self._sandbox.records.account(key or "")
            headers = account.count_call(self._sandbox.clock(), self._sandbox.options.rate_limit)
            response = await self._pass(request, handler, key)
        except Problem as problem:
            response = problem.response()
        response.headers.update(headers)
        return response

    def ordered_error(self, code: str, switch: str) -> Problem:
        """Return the error that a switch orders."""
        headers = None
        if CODES[code][0] == HTTPStatus.TOO_MANY_REQUESTS:
            options, now = self._sandbox.options, self._sandbox.clock()
            headers = retry_after(options.retry_after, now=now, as_date=options.retry_after_date)
        return Problem(code, f"Ordered by the switch {switch}.", headers=headers)

    async def _pass(self, request: Request, handler: Handler, key: str | None) -> Response:
        if key is None:
            raise Problem("invalid_api_key", "The API key is missing or malformed.")
        if self._sandbox.hit("throttle_rate"):
            raise self.ordered_error("rate_limit_exceeded", "throttle_rate")
        if self._sandbox.hit("error_rate"):
            status, code = self._sandbox.dice.choice("error", ERRORS).split()
            raise Problem(code, "Ordered by the switch error_rate.", status=int(status))
        return await handler(request, key)


def api_key_of(request: Request) -> str | None:
    """Return the key, if it is well-formed, from any of the three headers that Clipia accepts."""
    scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
    key = credentials if scheme.lower() in ("bearer", "key") else request.headers.get("X-Api-Key", "")
    return key if _API_KEY.fullmatch(key) else None
