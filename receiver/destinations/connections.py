"""One connection that many publishes share, for client libraries that do not reconnect by themselves."""

import abc
import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from receiver.destinations.base import Failure, attempt_timeout, closed_failure, copy_failure, timeout_failure
from receiver.errors import PublishFailed, PublishRejected


class Connection(abc.ABC):
    """One connection, from its opening to its end."""

    users = 0
    ended = False

    @property
    @abc.abstractmethod
    def is_open(self) -> bool:
        """Whether publishing may work; read only after `open`."""

    @abc.abstractmethod
    async def open(self) -> None:
        """Connect and prepare, in bounded time. Raises PublishFailed."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Disconnect in bounded time, by force if necessary. Raises no error."""

    @abc.abstractmethod
    def survives(self, failure: Failure) -> bool:
        """Return whether the connection is still usable after this failure of a publish."""

    async def explain_timeout(self) -> PublishFailed | None:
        """Return why a publish has timed out, or None if the reason is not known."""
        return None


ConnectionT = TypeVar("ConnectionT", bound=Connection)
Result = TypeVar("Result")


class SharedConnection(Generic[ConnectionT]):
    """Opens a connection for the first publish that needs it, and shares it with all others.

    If it does not survive a failure, the next publish opens another one. The old connection is closed when
    its last user is done.
    """

    def __init__(
        self, make: Callable[[], ConnectionT], *, shown: str, max_users: int, timeout: float | None = None
    ) -> None:
        self._make = make
        self._timeout = timeout
        self._shown = shown
        self._slots = asyncio.Semaphore(max_users)
        self._current: ConnectionT | None = None
        self._opening: asyncio.Task[ConnectionT | PublishFailed] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._idle = asyncio.Event()
        self._closed = False

    async def run(
        self, work: Callable[[ConnectionT], Awaitable[Result]], *, deadline: float | None = None
    ) -> Result:
        """Do the work with the connection. Raises PublishFailed if there is none or it takes too long."""
        if self._closed:
            raise closed_failure()
        connection: ConnectionT | None = None
        self._under_way += 1
        try:
            async with asyncio.timeout_at(deadline or self.new_deadline()), self._slots:
                connection = await self._get()
                connection.users += 1
                return await work(connection)
        except TimeoutError as error:
            failure = (connection and await connection.explain_timeout()) or timeout_failure(
                self._shown, self._timeout
            )
            self._retire_if_broken(connection, failure)
            try:
                raise failure from error
            finally:
                # The error's traceback has this frame. Without this line, the message that `work` holds would
                # stay in memory until the garbage collector runs.
                del failure
        except (PublishFailed, PublishRejected) as failure:
            self._retire_if_broken(connection, failure)
            raise
        finally:
            self._release(connection)

    async def run_all(
        self, count: int, work: Callable[[ConnectionT, list[Failure | None]], Awaitable[None]]
    ) -> list[Failure | None]:
        """Publish `count` messages with the connection; return for each its failure, or None.

        `work` gets a list and removes the failure of each message that is confirmed. If time runs out, the
        failure of the others is that of the whole.
        """
        unknown = PublishFailed(f"{self._shown}: not confirmed", reason="connection")
        failures: list[Failure | None] = [unknown] * count

        async def publish(connection: ConnectionT) -> None:
            await work(connection, failures)
            for failure in failures:
                if failure is not None:
                    self._retire_if_broken(connection, failure)

        try:
            await self.run(publish)
        except (PublishFailed, PublishRejected) as failure:
            failed = copy_failure(failure)
            return [failed if each is unknown else each for each in failures]
        return failures

    def new_deadline(self) -> float:
        """Return the time, on the event loop's clock, by which a publish that begins now must be done."""
        return asyncio.get_running_loop().time() + attempt_timeout(self._timeout)

    async def close(self) -> None:
        """Let the publishes under way end, which the timeout bounds, and disconnect."""
        self._closed = True
        while self._under_way:
            self._idle.clear()
            await self._idle.wait()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._current is not None:
            self._retire(self._current)
        if self._ending:
            await asyncio.wait(self._ending)

    async def _get(self) -> ConnectionT:
        """Return the connection or open one; if that fails, all publishes that wait for it fail alike."""
        if self._current is not None:
            if self._current.is_open:
                return self._current
            self._retire(self._current)
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        # Shielded: if this publish is cancelled, the others still wait for the connection.
        outcome = await asyncio.shield(self._opening)
        if isinstance(outcome, PublishFailed):
            raise copy_failure(outcome)
        return outcome

    async def _open(self) -> ConnectionT | PublishFailed:
        """Open a connection, or return the failure.

        If the failure were raised and all waiting publishes were cancelled, asyncio would report it as never
        retrieved.
        """
        connection = self._make()
        try:
            await connection.open()
            self._current = connection
        except PublishFailed as failure:
            return failure
        finally:
            self._opening = None
            if self._current is not connection:
                self._end_if_unused(connection)
        return connection

    def _release(self, connection: ConnectionT | None) -> None:
        if connection is not None:
            connection.users -= 1
            if connection is not self._current:
                self._end_if_unused(connection)
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()

    def _retire_if_broken(self, connection: ConnectionT | None, failure: Failure) -> None:
        if connection is not None and not connection.survives(failure):
            self._retire(connection)

    def _retire(self, connection: ConnectionT) -> None:
        """Stop sharing a connection; its present users keep it."""
        if self._current is connection:
            self._current = None
            self._end_if_unused(connection)

    def _end_if_unused(self, connection: ConnectionT) -> None:
        if not connection.users and not connection.ended:
            connection.ended = True
            ending = asyncio.create_task(connection.close())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
