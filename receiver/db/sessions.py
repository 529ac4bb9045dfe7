"""PostgreSQL sessions: opened to suit a server or a pooler, and replaced if they are lost.

A session is lost if its server closed it while it was idle, or if the server is read-only after a failover.
In the pool it would fail one transaction after another, and the other sessions are probably lost too, because
they lead to the same server. So each session has a generation number: a lost session starts a new generation,
and the pool replaces sessions of earlier generations when it hands them out.
"""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from importlib import import_module
from typing import Any, Final

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, DisconnectionError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from receiver.db.transactions import (
    OUR_MISTAKES,
    POOL_WAIT,
    SessionLost,
    is_condition,
    is_lost,
    sqlstate,
    unavailable,
    unavailable_error,
)
from receiver.db.urls import PostgresqlUrl
from receiver.errors import DatabaseUnavailable, SettingsError

COMMAND_WAIT: Final = 4.0
"""Seconds that the client waits for one statement.

The client measures them, because `statement_timeout` does not fire if the server process is frozen.
"""
ISOLATION: Final = "READ COMMITTED"
"""The level of each transaction; the default of a role or a database may be another one.

At a stricter level all statements of a transaction read one snapshot. An insert that waited for a duplicate
of its event would fail, and a transaction that waited for a lock would read the rows as they were before
the wait.
"""
YOUNG: Final = 1.0
"""Seconds for which a read-only session is not replaced, because a new one would be read-only too."""
IDLE_BEHIND_POOLER: Final = 2
"""Connections to a pooler that stay open without a transaction."""
_LIMITS: Final = {"lock_timeout": "2s", "idle_in_transaction_session_timeout": "10s"}

_SHORT_OF_RESOURCES: Final = "53"
_CHECK: Final = "SELECT current_setting('transaction_read_only')"
_CHECK_WITH_LIMITS: Final = ", ".join(
    (_CHECK, *(f"set_config('{name}', '{value}', true)" for name, value in _LIMITS.items()))
)
"""The first statement of a transaction: without its settings, and behind a pooler with them."""


class Sessions:
    """Opens sessions, pools them, and begins transactions in them."""

    def __init__(self, url: PostgresqlUrl) -> None:
        """Open no session yet. Raises SettingsError if the driver is missing."""
        try:
            self.driver: Final = import_module("asyncpg")
        except ModuleNotFoundError:
            raise SettingsError(
                "PostgreSQL needs the driver asyncpg: pip install 'clipia-receiver[postgres]'"
            ) from None
        self._url = url
        self._generation = 0
        self.is_pooled: bool | None = None
        """Whether the URL leads to a pooler such as pgbouncer; None until the first session is open."""

    async def open(self, *, command_timeout: float | None) -> Any:
        """Open a session of the driver.

        A pooler rejects unknown settings at connect. It also runs each transaction in any session of the
        server, which may lack a prepared statement, or have one of another client under its name. So the
        first session uses neither. If it shows that there is no pooler, it is opened anew with both.
        """
        for _ in range(3):
            plain = self.is_pooled is not False
            try:
                session = await self._connect(plain=plain, command_timeout=command_timeout)
            except self.driver.ProtocolViolationError:
                if plain:
                    raise
                self.is_pooled = None
                continue
            self.is_pooled = await self._is_shared(session)
            if self.is_pooled is plain:
                return session
            await session.close(timeout=POOL_WAIT)
        raise unavailable_error(
            "only some connections to its address lead to a pooler: set RECEIVER_DATABASE_URL to the address "
            "of the server or of the pooler"
        )

    async def _connect(self, *, plain: bool, command_timeout: float | None) -> Any:
        """Open a session; a `plain` one without our settings and without prepared statements."""
        try:
            return await self.driver.connect(
                **self._url.arguments,
                server_settings=self._url.server_settings | ({} if plain else _LIMITS),
                statement_cache_size=0 if plain else 100,
                timeout=self._url.connect_timeout or POOL_WAIT,
                command_timeout=command_timeout,
            )
        except Exception as error:
            self._raise_connect_failure(error)
            raise

    def _raise_connect_failure(self, error: Exception) -> None:
        """Raise SettingsError or DatabaseUnavailable for an error of the driver; return if it stays as it is.

        See `postgresql.Statements._raise_condition`: the caller must have no variable with the error.
        """
        driver, name = self.driver, type(error).__name__
        # KeyError: the URL has no user, and the user of the process has no name.
        if isinstance(error, (driver.ClientConfigurationError, ArithmeticError, KeyError, ValueError)):
            raise SettingsError(
                f"RECEIVER_DATABASE_URL cannot be used ({name}): check user, host and "
                "parameters; sslmode=verify-ca and verify-full need an sslrootcert"
            ) from error
        if isinstance(error, driver.TargetServerAttributeNotMatched):
            raise unavailable_error(
                f"no host takes writes, or none is in the state that target_session_attrs names ({name})"
            ) from error
        is_our_mistake = sqlstate(error)[:2] in OUR_MISTAKES and not is_condition(error)
        if isinstance(error, driver.PostgresError) and is_our_mistake:
            raise SettingsError(
                "the server rejects a parameter of RECEIVER_DATABASE_URL, most likely in options "
                f"({name}, SQLSTATE {sqlstate(error)})"
            ) from error
        # The driver raises a ConnectionError without a number if TLS fails.
        if isinstance(error, ConnectionError) and error.errno is None:
            raise unavailable_error(f"the server did not agree to TLS: see sslmode ({name})") from error

    async def _is_shared(self, session: Any) -> bool:
        # A pooler has no process for a client and tells it an invented process id. The statement has no name,
        # so it is prepared and run in one step, which also works behind a pooler.
        try:
            statement = await session.prepare("SELECT pg_backend_pid()", name="")
            return bool(await statement.fetchval() != session.get_server_pid())
        except BaseException:
            session.terminate()
            raise

    def engine(
        self,
        *,
        command_timeout: float | None = COMMAND_WAIT,
        isolation_level: str = ISOLATION,
        **options: Any,
    ) -> AsyncEngine:
        """Return an engine for these sessions."""
        engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=partial(self.open, command_timeout=command_timeout),
            isolation_level=isolation_level,
            hide_parameters=True,
            **options,
        )

        self._watch_pool(engine.sync_engine)
        event.listen(engine.sync_engine, "handle_error", self._handle_error)
        return engine

    def _watch_pool(self, engine: Engine) -> None:
        idle = set[int]()

        @event.listens_for(engine, "connect")
        def _connect(_connection: Any, record: Any) -> None:
            record.info["generation"], record.info["opened"] = self._generation, time.monotonic()

        @event.listens_for(engine, "checkout")
        def _checkout(connection: Any, record: Any, _proxy: Any) -> None:
            idle.discard(id(record))
            if not self.is_current(record.info) or connection.driver_connection.is_closed():
                raise DisconnectionError

        @event.listens_for(engine, "checkin")
        def _checkin(connection: Any, record: Any) -> None:
            if connection is None:
                return
            # In session mode a pooler assigns a session for as long as a connection is open. If this process
            # kept them all open, other clients would get none.
            if self.is_pooled and len(idle) >= IDLE_BEHIND_POOLER:
                record.invalidate()
            else:
                idle.add(id(record))

    def _handle_error(self, context: ExceptionContext) -> None:
        error, connection = context.original_exception, context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        if not isinstance(error, Exception):
            return  # a cancelled task is no evidence against the server
        # After a timeout the server may be gone without closing the connection.
        if context.is_disconnect or is_lost(error) or isinstance(error, TimeoutError):
            self.distrust(connection.info)
            context.is_disconnect = True
        elif sqlstate(error).startswith(_SHORT_OF_RESOURCES):
            context.is_disconnect, context.invalidate_pool_on_disconnect = True, False

    def is_current(self, info: dict[Any, Any]) -> bool:
        """Tell by a connection's `info` whether its session is of the current generation."""
        return bool(info.get("generation") == self._generation)

    def distrust(self, info: dict[Any, Any]) -> None:
        """Start a new generation, so that the session of `info` and all older ones are replaced."""
        if self.is_current(info):
            self._generation += 1

    @asynccontextmanager
    async def transaction(self, engine: AsyncEngine, *, writes: bool) -> AsyncIterator[AsyncConnection]:
        """Open one transaction; raise DatabaseUnavailable if the database fails.

        The first statement checks the session. If the session is lost, the transaction is still empty, so it
        starts again in a new session.
        """
        with unavailable():
            async with AsyncExitStack() as stack:
                try:
                    connection = await self._begin(engine, stack)
                except (DBAPIError, SessionLost, OSError) as error:
                    if not is_lost(error):
                        raise
                    connection = await self._begin(engine, stack)
                if writes and connection.info["read_only"]:
                    raise DatabaseUnavailable(
                        "the database is read-only: is it a standby?", reason="database"
                    )
                yield connection

    async def _begin(self, engine: AsyncEngine, stack: AsyncExitStack) -> AsyncConnection:
        async with AsyncExitStack() as opening:
            with opening_session():
                connection = await opening.enter_async_context(engine.begin())
            # Behind a pooler the settings are local to the transaction; the next client gets the session.
            found = await connection.exec_driver_sql(_CHECK_WITH_LIMITS if self.is_pooled else _CHECK)
            info = connection.info
            info["read_only"] = found.scalar_one() == "on"
            if info["read_only"] and time.monotonic() - info["opened"] > YOUNG:
                self.distrust(info)
                raise SessionLost
            await stack.enter_async_context(opening.pop_all())
        return connection


@contextmanager
def opening_session() -> Iterator[None]:
    """Raise SessionLost if each new session is lost at once; SQLAlchemy raises InvalidRequestError then."""
    try:
        yield
    except InvalidRequestError as error:
        raise SessionLost from error
