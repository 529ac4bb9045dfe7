"""Clients of the internal API inside its own process: pages and agents make the same calls as programs."""

from collections.abc import Sequence

import httpx
from starlette.applications import Starlette

from receiver.api.auth import Caller, OneCaller
from receiver.api.endpoints import Endpoint, guarded
from receiver.client import Client
from receiver.db.database import Database


class LocalClients:
    """Makes calls for callers whose token has been checked. The guard of each endpoint checks their scopes.

    An answer is read as a whole, so a stream needs `app`.
    """

    def __init__(self, table: Sequence[Endpoint], database: Database) -> None:
        self._table = table
        self._database = database
        self._apps: dict[Caller, Starlette] = {}
        self._clients: dict[Caller, Client] = {}

    def app(self, caller: Caller) -> Starlette:
        """Return the internal API as this caller sees it, without a token."""
        if caller not in self._apps:
            routes = guarded(self._table, OneCaller(caller), self._database)
            self._apps[caller] = Starlette(routes=routes)
        return self._apps[caller]

    def client(self, caller: Caller) -> Client:
        """Return the client of a caller; it has no connections, so it needs no close."""
        if caller not in self._clients:
            transport = httpx.ASGITransport(self.app(caller))
            self._clients[caller] = Client("http://localhost", "-", transport=transport)
        return self._clients[caller]
