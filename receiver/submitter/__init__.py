"""Submit jobs to Clipia: once each, whatever crashes in between.

::

    from receiver.submitter import Submitter

    async with Submitter.open() as submitter:
        job = await submitter.submit("nano-banana-2", {"prompt": "a cat"}, idempotency_key="order-4711")
        job = await submitter.wait(job.id, seconds=120)
        print(job.state, [file.uri for file in job.event.media])

It works on the service's own database, with the service's settings; `receiver worker` or `receiver serve`
goes on with what the submitting process could not finish. `SyncSubmitter` is for code without an event loop.
"""

from receiver.submitter.job import Job, JobAttempt, JobDelivery, JobEvent, JobFile, JobPage
from receiver.submitter.service import Submitter
from receiver.submitter.sync import SyncSubmitter

__all__ = [
    "Job",
    "JobAttempt",
    "JobDelivery",
    "JobEvent",
    "JobFile",
    "JobPage",
    "Submitter",
    "SyncSubmitter",
]
