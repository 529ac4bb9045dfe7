"""The submitter for code without an event loop."""

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from anyio.from_thread import start_blocking_portal

from receiver.price import Credits
from receiver.settings import Settings
from receiver.submitter.job import Job, JobPage
from receiver.submitter.service import Submitter


class SyncSubmitter:
    """A `Submitter` in an event loop of its own, in a thread.

    ::

        with SyncSubmitter() as submitter:
            job = submitter.submit("nano-banana-2", {"prompt": "a cat"}, idempotency_key="order-4711")
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """Take the service's settings unless others are given."""
        self._settings = settings
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Open it. Raises SettingsError and DatabaseUnavailable."""
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            manager = self._portal.wrap_async_context_manager(Submitter.open(self._settings))
            self._submitter = stack.enter_context(manager)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._stack.close()

    def submit(
        self,
        model: str,
        input: Mapping[str, Any],  # noqa: A002 - Clipia's name for it
        *,
        idempotency_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        max_cost: Credits | None = None,
        strict: bool | None = None,
        caller: str = "local",
    ) -> Job:
        """As `Submitter.submit`."""

        async def run() -> Job:
            return await self._submitter.submit(
                model,
                input,
                idempotency_key=idempotency_key,
                metadata=metadata,
                max_cost=max_cost,
                strict=strict,
                caller=caller,
            )

        return self._portal.call(run)

    def get(self, job_id: UUID) -> Job | None:
        """As `Submitter.get`."""
        return self._portal.call(self._submitter.get, job_id)

    def wait(self, job_id: UUID, *, seconds: float) -> Job | None:
        """As `Submitter.wait`."""

        async def run() -> Job | None:
            return await self._submitter.wait(job_id, seconds=seconds)

        return self._portal.call(run)

    def list_jobs(self, **filters: Any) -> JobPage:
        """As `Submitter.list_jobs`."""

        async def run() -> JobPage:
            return await self._submitter.list_jobs(**filters)

        return self._portal.call(run)
