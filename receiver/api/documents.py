"""`/openapi.json` and `/docs`: the specification for programs, and as a page for people."""

from collections.abc import Sequence
from functools import cached_property

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.api.docs_page import CONTENT_SECURITY_POLICY, make_page
from receiver.api.endpoints import Endpoint
from receiver.api.specification import make_specification


class Documents:
    """Both are made at the first request: most processes are never asked. They need no token."""

    def __init__(self, table: Sequence[Endpoint]) -> None:
        self._table = table

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/openapi.json", self._show_specification, methods=["GET"]),
            Route("/docs", self._show_page, methods=["GET"]),
        ]

    @cached_property
    def _specification(self) -> bytes:
        return orjson.dumps(make_specification(self._table))

    @cached_property
    def _page(self) -> bytes:
        return make_page(make_specification(self._table)).encode()

    async def _show_specification(self, _request: Request) -> Response:
        return Response(self._specification, media_type="application/json")

    async def _show_page(self, _request: Request) -> Response:
        headers = {
            "content-security-policy": CONTENT_SECURITY_POLICY,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }
        return Response(self._page, 200, headers, "text/html")
