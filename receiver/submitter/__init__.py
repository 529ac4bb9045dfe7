"""Submits jobs to Clipia, each exactly once even if processes crash.

::

    from receiver.submitter import Submitter

    async with Submitter.open() as submitter:
        job = await submitter.submit("nano-banana-2", {"prompt": "a cat"}, idempotency_key="order-4711")
        job = await submitter.wait(job.id, seconds=120)
        print(job.state, [file.uri for file in job.event.media])

It uses the database and the settings of the service. If the submitting process cannot finish a submission,
`receiver worker` or `receiver serve` does. `SyncSubmitter` is for code without an event loop.
"""

from receiver.submitter.job import Job, JobAttempt, JobDelivery, JobEvent, JobFile, JobPage
from receiver.submitter.service import Submitter
from receiver.submitter.sync_submitter import SyncSubmitter

__all__ = ["Job", "JobAttempt", "JobDelivery", "JobEvent", "JobFile", "JobPage", "Submitter", "SyncSubmitter"]
