"""Sessions of PostgreSQL: opened to suit the server or the pooler that answers, replaced once they are lost.

A session may answer and be of no use: after a failover its server is read-only. Or the server has ended it
while it was idle. Such a session must not go back into the pool, where it would fail one transaction after
another. If one session is lost, the others most likely are: they lead to the same server. So sessions have a
generation, and a session of an earlier generation is replaced when it is taken out of its pool.
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
)
from receiver.db.urls import PostgresqlUrl
from receiver.errors import DatabaseUnavailable, SettingsError

COMMAND_WAIT: Final = 4.0
"""Seconds that the client waits for one statement.

It is the client that counts: `statement_timeout` never fires in a server process that is frozen.
"""
ISOLATION: Final = "READ COMMITTED"
"""Every transaction begins with it: a role or a database may have another default.

At a stricter level a statement sees nothing that was committed after the transaction's first one. An insert
that waited for another delivery of its event would fail, and a transaction that waited for a lock would then
read what was there before the wait.
"""
YOUNG: Final = 1.0
"""Seconds for which a session that turns out to be read-only is not replaced: the next would be so, too."""
IDLE_BEHIND_POOLER: Final = 2
"""Connections to a pooler that stay open without a transaction."""
_LIMITS: Final = {"lock_timeout": "2s", "idle_in_transaction_session_timeout": "10s"}

_SHORT_OF_RESOURCES: Final = "53"
_IS_READ_ONLY: Final = "SELECT current_setting('transaction_read_only')"
_CAREFUL: Final = ", ".join(
    (_IS_READ_ONLY, *(f"set_config('{name}', '{value}', true)" for name, value in _LIMITS.items()))
)
"""A transaction's first statement, without and with its settings."""


class Sessions:
    """Opens sessions, pools them, and begins transactions on them."""

    def __init__(self, url: PostgresqlUrl) -> None:
        """Raise SettingsError if the driver is missing; connect to nothing yet."""
        try:
            self.driver: Final = import_module("asyncpg")
        except ModuleNotFoundError:
            raise SettingsError(
                "PostgreSQL needs the driver asyncpg: pip install 'clipia-receiver[postgres]'"
            ) from None
        self._url = url
        self._generation = 0
        self.is_pooled: bool | None = None
        """Whether a pooler such as pgbouncer stands in between; None until the first session is open."""

    async def open(self, *, command_timeout: float | None) -> Any:
        """Open a session of the driver's.

        A pooler refuses unknown settings at connect, and runs each transaction of a client in any session of
        the server: a statement that was prepared by name would be missing there, or be another client's. So
        the first session does without both, and is opened anew if there is no pooler.
        """
        for _ in range(3):
            careful = self.is_pooled is not False
            try:
                session = await self._connect(careful=careful, command_timeout=command_timeout)
            except self.driver.ProtocolViolationError:
                if careful:
                    raise
                self.is_pooled = None
                continue
            self.is_pooled = await self._is_shared(session)
            if self.is_pooled is careful:
                return session
            await session.close(timeout=POOL_WAIT)
        raise DatabaseUnavailable(
            "the database is unavailable: its address leads to a pooler now and then", reason="database"
        )

    async def _connect(self, *, careful: bool, command_timeout: float | None) -> Any:
        try:
            return await self.driver.connect(
                **self._url.arguments,
                server_settings=self._url.server_settings | ({} if careful else _LIMITS),
                statement_cache_size=0 if careful else 100,
                timeout=self._url.connect_timeout or POOL_WAIT,
                command_timeout=command_timeout,
            )
        except (self.driver.ClientConfigurationError, ArithmeticError, KeyError, ValueError) as error:
            # KeyError: no user is given, and the process's own has no name.
            raise SettingsError(
                f"RECEIVER_DATABASE_URL cannot be used ({type(error).__name__}): check user, host and "
                "parameters; sslmode=verify-ca and verify-full need an sslrootcert"
            ) from error
        except self.driver.TargetServerAttributeNotMatched as error:
            raise _unavailable(
                "no host takes writes, or is what target_session_attrs asks for", error
            ) from error
        except self.driver.PostgresError as error:
            if sqlstate(error)[:2] not in OUR_MISTAKES or is_condition(error):
                raise
            raise SettingsError(
                "the server refuses a parameter of RECEIVER_DATABASE_URL, most likely in options "
                f"({type(error).__name__}, SQLSTATE {sqlstate(error)})"
            ) from error
        except ConnectionError as error:
            if error.errno is not None:
                raise
            # The driver's own, which has no number.
            raise _unavailable("the server did not agree to TLS: see sslmode", error) from error

    async def _is_shared(self, session: Any) -> bool:
        # A pooler tells each client a process id of its own making, because it has no process for it. A
        # statement without a name is prepared and run in one go, which is right behind a pooler, too.
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
            # A pooler in session mode lends a session for as long as a connection is open. If this process
            # kept all of them, others would get none.
            if self.is_pooled and len(idle) >= IDLE_BEHIND_POOLER:
                record.invalidate()
            else:
                idle.add(id(record))

    def _handle_error(self, context: ExceptionContext) -> None:
        error, connection = context.original_exception, context.connection
        if connection is None or connection.closed or connection.invalidated:
            return
        if not isinstance(error, Exception):
            return  # a task that is canceled says nothing about the server
        # A statement without an answer may be a server that is gone without a word.
        if context.is_disconnect or is_lost(error) or isinstance(error, TimeoutError):
            self.distrust(connection.info)
            context.is_disconnect = True
        elif sqlstate(error).startswith(_SHORT_OF_RESOURCES):
            context.is_disconnect, context.invalidate_pool_on_disconnect = True, False

    def is_current(self, info: dict[Any, Any]) -> bool:
        """Tell by a connection's `info` whether nothing speaks against its session."""
        return bool(info.get("generation") == self._generation)

    def distrust(self, info: dict[Any, Any]) -> None:
        """Replace all sessions that are as old as that of `info` when they are used next."""
        if self.is_current(info):
            self._generation += 1

    @asynccontextmanager
    async def transaction(self, engine: AsyncEngine, *, writes: bool) -> AsyncIterator[AsyncConnection]:
        """Open one transaction; raise DatabaseUnavailable for the database's condition.

        A first statement tells whether the session is of use. If it is not nothing has been done in it, and
        the transaction begins once more in a new session.
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
            # Behind a pooler a setting of the session would be the next client's, too.
            found = await connection.exec_driver_sql(_CAREFUL if self.is_pooled else _IS_READ_ONLY)
            info = connection.info
            info["read_only"] = found.scalar_one() == "on"
            if info["read_only"] and time.monotonic() - info["opened"] > YOUNG:
                self.distrust(info)
                raise SessionLost
            await stack.enter_async_context(opening.pop_all())
        return connection


def _unavailable(words: str, error: Exception) -> DatabaseUnavailable:
    return DatabaseUnavailable(
        f"the database is unavailable: {words} ({type(error).__name__})", reason="database"
    )


@contextmanager
def opening_session() -> Iterator[None]:
    """Raise SessionLost if each new session is lost at once, for which SQLAlchemy has no error of its own."""
    try:
        yield
    except InvalidRequestError as error:
        raise SessionLost from error
