"""Batches of messages for brokers that take several in one request."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from receiver.batching import Batcher
from receiver.destinations.base import Failure, attempt_timeout, closed_failure, copy_failure, timeout_failure
from receiver.errors import PublishFailed

Message = TypeVar("Message")


class _Entry(NamedTuple, Generic[Message]):
    """Messages that are sent in one batch."""

    messages: Sequence[Message]
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
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._batcher: Batcher[_Entry[Message], Sequence[Failure | None]] = Batcher(
            self._send_entries,
            # The larger share of both limits.
            weigh=lambda entry: max(entry.size * max_messages, len(entry.messages) * max_bytes),
            max_bytes=max_bytes * max_messages,
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
        [failure] = await self._add([message], size)
        if failure is not None:
            raise copy_failure(failure)

    async def publish_together(self, messages: Sequence[Message], size: int) -> Sequence[Failure | None]:
        """Send messages in one batch; return for each its failure, or None if it is confirmed."""
        if self.closed:
            return [closed_failure()] * len(messages)
        return await self._add(messages, size)

    async def _add(self, messages: Sequence[Message], size: int) -> Sequence[Failure | None]:
        deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            async with asyncio.timeout_at(deadline):
                return await self._batcher.add(_Entry(messages, size, deadline))
        except TimeoutError:
            return [timeout_failure(self._shown, self._timeout)] * len(messages)

    async def close(self) -> None:
        """Take no more messages, and send those that wait; the timeout bounds this."""
        self.closed = True
        await self._batcher.drain()

    async def _send_entries(self, batch: Sequence[_Entry[Message]]) -> Sequence[Sequence[Failure | None]]:
        failure: Failure
        messages = [message for entry in batch for message in entry.messages]
        try:
            # The last entry has the latest deadline.
            async with asyncio.timeout_at(batch[-1].deadline):
                failures = await self._send(messages)
        except TimeoutError:
            failure = timeout_failure(self._shown, self._timeout)
            failures = [failure] * len(messages)
        except Exception as error:  # noqa: BLE001 - a client library may fail to read an answer
            failure = PublishFailed(f"{self._shown}: {type(error).__name__}", reason="protocol")
            failures = [failure] * len(messages)
        left = iter(failures)
        return [[next(left) for _ in entry.messages] for entry in batch]
