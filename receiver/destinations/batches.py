"""Batches of messages for brokers that take several in one request."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from receiver.batching import Batcher
from receiver.destinations.base import Failure, attempt_timeout, closed_failure, copy_failure, timeout_failure
from receiver.errors import PublishFailed

Message = TypeVar("Message")


class _Entry(NamedTuple, Generic[Message]):
    message: Message
    size: int
    deadline: float


class BatchPublisher(Generic[Message]):
    """Sends messages in batches, several at once; `send` returns a failure or None for each message."""

    def __init__(
        self,
        send: Callable[[Sequence[Message]], Awaitable[Sequence[Failure | None]]],
        *,
        shown: str,
        max_in_flight: int,
        max_messages: int,
        max_bytes: int,
        timeout: float | None = None,
    ) -> None:
        self._send = send
        self._shown = shown
        self._timeout = timeout
        self._batcher: Batcher[_Entry[Message], Failure | None] = Batcher(
            self._send_entries,
            max_items=max_messages,
            weigh=lambda entry: entry.size,
            max_bytes=max_bytes,
            max_in_flight=max_in_flight,
        )
        self.closed = False

    @property
    def timeout(self) -> float:
        """Seconds for a whole publish, from waiting for a batch to the answer."""
        return attempt_timeout(self._timeout)

    async def publish(self, message: Message, size: int) -> None:
        """Return when the message is confirmed. Raises PublishFailed and PublishRejected."""
        if self.closed:
            raise closed_failure()
        deadline = asyncio.get_running_loop().time() + self.timeout
        failure: Failure | None
        try:
            async with asyncio.timeout_at(deadline):
                failure = await self._batcher.add(_Entry(message, size, deadline))
        except TimeoutError:
            failure = timeout_failure(self._shown, self._timeout)
        if failure is not None:
            raise copy_failure(failure)

    async def close(self) -> None:
        """Take no more messages, and send those that wait; the timeout bounds this."""
        self.closed = True
        await self._batcher.drain()

    async def _send_entries(self, batch: Sequence[_Entry[Message]]) -> Sequence[Failure | None]:
        failure: Failure
        try:
            # The last entry has the latest deadline.
            async with asyncio.timeout_at(batch[-1].deadline):
                return await self._send([entry.message for entry in batch])
        except TimeoutError:
            failure = timeout_failure(self._shown, self._timeout)
        except Exception as error:  # noqa: BLE001 - a client library may fail to read an answer
            failure = PublishFailed(f"{self._shown}: {type(error).__name__}", reason="protocol")
        return [failure] * len(batch)
