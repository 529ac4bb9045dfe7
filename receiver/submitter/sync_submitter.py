"""The submitter for code without an event loop."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from anyio.from_thread import start_blocking_portal

from receiver.price import Credits
from receiver.settings import Settings
from receiver.submitter.job import Job, JobPage
from receiver.submitter.service import Submitter


class SyncSubmitter:
    """A `Submitter` with its own event loop, in a thread.

    ::

        with SyncSubmitter() as submitter:
            job = submitter.submit("nano-banana-2", {"prompt": "a cat"}, idempotency_key="order-4711")
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """Without `settings`, those of the service are used."""
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
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Job:
        """Call `Submitter.submit`."""
        call = partial(
            self._submitter.submit,
            model,
            input,
            idempotency_key=idempotency_key,
            metadata=metadata,
            max_cost=max_cost,
            strict=strict,
            caller=caller,
            traceparent=traceparent,
            tracestate=tracestate,
        )
        return self._portal.call(call)

    def get(self, job_id: UUID) -> Job | None:
        """Call `Submitter.get`."""
        return self._portal.call(self._submitter.get, job_id)

    def wait(self, job_id: UUID, *, seconds: float) -> Job | None:
        """Call `Submitter.wait`."""
        return self._portal.call(partial(self._submitter.wait, job_id, seconds=seconds))

    def list_jobs(self, **filters: Any) -> JobPage:
        """Call `Submitter.list_jobs`."""
        return self._portal.call(partial(self._submitter.list_jobs, **filters))
