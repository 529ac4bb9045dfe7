"""Messages that come while others are on their way gather and go together, for clients that send batches."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from receiver.destinations.base import USUAL_TIMEOUT, Failure, again, closed
from receiver.errors import PublishFailed

TIMEOUT: Final = USUAL_TIMEOUT
"""Seconds for a whole publish, from waiting for its batch to the answer."""

Message = TypeVar("Message")


@dataclass(kw_only=True, slots=True)
class _Entry(Generic[Message]):
    """One message on its way; `outcome` is what `publish` has to raise, or None."""

    message: Message
    size: int
    deadline: float
    outcome: asyncio.Future[Failure | None]


class Batches(Generic[Message]):
    """Sends messages in batches, several at once; `send` returns an outcome for each message of its batch."""

    def __init__(
        self,
        send: Callable[[Sequence[Message]], Awaitable[Sequence[Failure | None]]],
        *,
        shown: str,
        at_once: int,
        max_messages: int,
        max_bytes: int,
        timeout: float | None = None,
    ) -> None:
        self._send = send
        self._shown = shown
        self._at_once = at_once
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._waiting: deque[_Entry[Message]] = deque()
        self._senders: set[asyncio.Task[None]] = set()
        self.closed = False

    @property
    def timeout(self) -> float:
        """Seconds for a whole publish."""
        return self._timeout or TIMEOUT

    async def publish(self, message: Message, size: int) -> None:
        """Return when the message is confirmed. Raises PublishFailed and PublishRejected."""
        if self.closed:
            raise closed()
        loop = asyncio.get_running_loop()
        entry = _Entry(
            message=message, size=size, deadline=loop.time() + self.timeout, outcome=loop.create_future()
        )
        self._waiting.append(entry)
        if len(self._senders) < self._at_once:
            self._senders.add(asyncio.create_task(self._send_waiting()))
        try:
            async with asyncio.timeout_at(entry.deadline):
                failure = await entry.outcome
        except TimeoutError:
            failure = self._late()
        if failure is not None:
            raise again(failure)

    async def close(self) -> None:
        """Send what waits, which the timeout bounds, and take no more."""
        self.closed = True
        if self._senders:
            await asyncio.wait(self._senders)

    async def _send_waiting(self) -> None:
        try:
            while batch := self._take():
                for entry, outcome in zip(batch, await self._outcomes(batch), strict=True):
                    if not entry.outcome.done():
                        entry.outcome.set_result(outcome)
        finally:
            # Not by a callback: who publishes before that runs would wait for a sender that has ended.
            self._senders.discard(asyncio.current_task())

    def _take(self) -> list[_Entry[Message]]:
        """Take the next batch, without what nobody waits for any more; a large message goes alone."""
        batch: list[_Entry[Message]] = []
        room = self._max_bytes
        while self._waiting and len(batch) < self._max_messages:
            entry = self._waiting[0]
            if not entry.outcome.done():
                if batch and entry.size > room:
                    break
                batch.append(entry)
                room -= entry.size
            self._waiting.popleft()
        return batch

    async def _outcomes(self, batch: list[_Entry[Message]]) -> Sequence[Failure | None]:
        try:
            async with asyncio.timeout_at(max(entry.deadline for entry in batch)):
                return await self._send([entry.message for entry in batch])
        except TimeoutError:
            failure = self._late()
        except Exception as error:  # noqa: BLE001 - a client may stumble over an answer
            failure = PublishFailed(f"{self._shown}: {type(error).__name__}", reason="protocol")
        return [failure] * len(batch)

    def _late(self) -> PublishFailed:
        return PublishFailed(f"{self._shown} did not answer within {self.timeout:g} s", reason="timeout")
