"""One connection that many publishes share, for clients whose connections do not mend themselves."""

import abc
import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from receiver.destinations.base import USUAL_TIMEOUT, Failure, again, closed
from receiver.errors import PublishFailed, PublishRejected

TIMEOUT: Final = USUAL_TIMEOUT
"""Seconds for a whole publish: its turn, a connection and the confirmation."""


class Connection(abc.ABC):
    """One connection, from its opening to its end."""

    users = 0
    ended = False

    @property
    @abc.abstractmethod
    def is_open(self) -> bool:
        """Whether publishing may work; asked only after `open`."""

    @abc.abstractmethod
    async def open(self) -> None:
        """Connect and prepare, in bounded time. Raises PublishFailed."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Disconnect in bounded time, by force where need be. Raises nothing."""

    @abc.abstractmethod
    def survives(self, failure: Failure) -> bool:
        """Return whether the connection is as good as before when a publish has failed so."""

    async def explain_timeout(self) -> PublishFailed | None:
        """Return what a publish has waited for, where that is known."""
        return None


Link = TypeVar("Link", bound=Connection)
Result = TypeVar("Result")


class Shared(Generic[Link]):
    """Opens a connection for the first who needs it, and lends it to all.

    After a failure that it does not survive the next who needs one opens another; the old one is closed when
    its last user is done.
    """

    def __init__(
        self, make: Callable[[], Link], *, shown: str, max_users: int, timeout: float | None = None
    ) -> None:
        self._make = make
        self._timeout = timeout
        self._shown = shown
        self._places = asyncio.Semaphore(max_users)
        self._current: Link | None = None
        self._opening: asyncio.Task[Link | PublishFailed] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._idle = asyncio.Event()
        self._closed = False

    async def run(
        self, work: Callable[[Link], Awaitable[Result]], *, deadline: float | None = None
    ) -> Result:
        """Do the work with the connection. Raises PublishFailed where there is none or it takes too long."""
        if self._closed:
            raise closed()
        link: Link | None = None
        self._under_way += 1
        try:
            async with asyncio.timeout_at(deadline or self.deadline_of_a_publish()), self._places:
                link = await self._get()
                link.users += 1
                return await work(link)
        except TimeoutError as error:
            failure = (link and await link.explain_timeout()) or PublishFailed(
                f"{self._shown} did not answer within {self._timeout or TIMEOUT:g} s", reason="timeout"
            )
            self._reconsider(link, failure)
            raise failure from error
        except (PublishFailed, PublishRejected) as failure:
            self._reconsider(link, failure)
            raise
        finally:
            if link is not None:
                link.users -= 1
                if link is not self._current:
                    self._end_if_unused(link)
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    def deadline_of_a_publish(self) -> float:
        """Return when a publish that begins now has taken too long."""
        return asyncio.get_running_loop().time() + (self._timeout or TIMEOUT)

    async def close(self) -> None:
        """Let what is under way end, which the timeout bounds, and disconnect."""
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

    async def _get(self) -> Link:
        """Return the connection or open one; all who wait for it share its failure."""
        if self._current is not None:
            if self._current.is_open:
                return self._current
            self._retire(self._current)
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        outcome = await asyncio.shield(self._opening)
        if isinstance(outcome, PublishFailed):
            raise again(outcome)
        return outcome

    async def _open(self) -> Link | PublishFailed:
        """Return a failure instead of raising it: nobody may be left to take it."""
        link = self._make()
        try:
            await link.open()
            self._current = link
        except PublishFailed as failure:
            return failure
        finally:
            self._opening = None
            if self._current is not link:
                self._end_if_unused(link)
        return link

    def _reconsider(self, link: Link | None, failure: Failure) -> None:
        if link is not None and not link.survives(failure):
            self._retire(link)

    def _retire(self, link: Link) -> None:
        """Lend the connection to nobody any more."""
        if self._current is link:
            self._current = None
            self._end_if_unused(link)

    def _end_if_unused(self, link: Link) -> None:
        if not link.users and not link.ended:
            link.ended = True
            ending = asyncio.create_task(link.close())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
