"""The exception tree.

::

    ReceiverError
    ├── SettingsError            a setting is missing or wrong; the message names it and gives advice
    │   └── UnusableFileError    a file of a setting is missing or unusable; it may be repaired later
    ├── UsageError               a command line is wrong; the message says how to write it
    ├── SignatureError           a webhook's signature is invalid or too old (`reason`)
    ├── UnrecognizedBody         an authentic body that is not an event (`reason`)
    ├── PermanentError           a retry cannot help (`reason`)
    │   ├── RequestError         a job or a call is invalid, or its state does not allow it (`code`, `type`)
    │   │   ├── RequestTooLarge
    │   │   └── RefusedByClipia  Clipia refuses a job or a call for good (`status`)
    │   ├── MediaBlocked         the guard blocked a URL, an address or a file
    │   └── PublishRejected      the destination rejected this message permanently
    └── TransientError           a later retry may help (`reason`, `retry_after`)
        ├── ClipiaUnavailable    the API gave no answer, or an unusable one (`may_have_arrived`)
        │   ├── AccountRefused   401: the key or the account is at fault, not the job
        │   └── RefusedForNow    402, 403: Clipia refuses this job until the account changes (`type`)
        ├── DatabaseUnavailable
        ├── ReceiverUnavailable  `receiver.client` got no answer, or one of another program
        ├── MediaUnavailable     the CDN did not send a whole file
        │   ├── MediaMissing     the CDN has no such file (404 and similar): given up after a few attempts
        │   ├── NotMedia         a page or a text came in place of a file, which may come later
        │   └── MediaDoubtful    a whole body came, but its size, container or digest is wrong (`sha256`)
        ├── StorageUnavailable   our own storage cannot take a file (full, unreachable)
        └── PublishFailed        the destination did not confirm

Data is in attributes; messages are never parsed. `reason` is a short fixed word that fits a metric's label.
"""

from typing import Literal

SignatureReason = Literal["missing", "ambiguous", "format", "mismatch", "stale", "future"]
"""In the order of the checks."""
BodyReason = Literal["not_json", "not_object", "duplicate_key", "request_id", "status"]


class ReceiverError(Exception):
    """Base of the package's own exceptions."""


class SettingsError(ReceiverError):
    """A setting is missing or wrong; the message names it and tells the operator how to repair it."""


class UnusableFileError(SettingsError):
    """A file that a setting names is missing or has the wrong content; it may be repaired later."""


class UsageError(ReceiverError):
    """A command line is wrong; the message says how to write it."""


class SignatureError(ReceiverError):
    """A webhook's signature is missing, invalid or too old.

    `reason` is for metrics and logs only. The answer must be the same for each, so that it does not help a
    forger.
    """

    def __init__(self, reason: SignatureReason) -> None:
        super().__init__(reason)
        self.reason = reason


class UnrecognizedBody(ReceiverError):
    """An authentic body that is not an event: not JSON, no `request_id`, or an unknown status."""

    def __init__(self, reason: BodyReason) -> None:
        super().__init__(reason)
        self.reason = reason


class PermanentError(ReceiverError):
    """A retry cannot help."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RequestError(PermanentError):
    """A job or a call is invalid, or the state of its object does not allow it.

    `api.answers` has the HTTP status of each `code`. `type` is one of the types of Clipia's errors. `job_id`
    is set if a job was made.
    """

    def __init__(
        self, message: str, *, code: str, type_: str = "invalid_request_error", job_id: str | None = None
    ) -> None:
        super().__init__(message, reason=code)
        self.type = type_
        self.code = code
        self.job_id = job_id


class RequestTooLarge(RequestError):
    """A body is larger than the receiver or Clipia accepts."""


class RefusedByClipia(RequestError):
    """Clipia refuses a job or a call permanently; `status`, `type` and `code` are those of its answer."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int,
        type_: str = "invalid_request_error",
        job_id: str | None = None,
    ) -> None:
        super().__init__(message, code=code, type_=type_, job_id=job_id)
        self.status = status


class MediaBlocked(PermanentError):
    """The media guard blocked a URL, an address, a redirect or a file."""


class PublishRejected(PermanentError):
    """The destination rejected this message permanently. `answer` is the start of its answer as text."""

    def __init__(self, message: str, *, reason: str, answer: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.answer = answer


class TransientError(ReceiverError):
    """A later retry may help. `retry_after` is in seconds, if the other side gave one."""

    def __init__(self, message: str, *, reason: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class ClipiaUnavailable(TransientError):
    """The Clipia API did not answer, refused for now, or sent an unusable answer.

    `reason` is Clipia's error code, if it sent one. If `may_have_arrived` is True, Clipia may have carried
    out the request.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        status: int | None = None,
        may_have_arrived: bool = True,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason, retry_after=retry_after)
        self.status = status
        self.may_have_arrived = may_have_arrived


class AccountRefused(ClipiaUnavailable):
    """Clipia refuses the account (401): the jobs are not at fault and stay open."""


class RefusedForNow(ClipiaUnavailable):
    """Clipia refuses a job for its price, its model or the key's scopes (402, 403).

    Other jobs may be accepted. After a top-up, a new plan or another scope, Clipia may accept this one too.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        status: int | None = None,
        may_have_arrived: bool = False,
        retry_after: float | None = None,
        type_: str = "invalid_request_error",
    ) -> None:
        super().__init__(
            message, reason=reason, status=status, may_have_arrived=may_have_arrived, retry_after=retry_after
        )
        self.type = type_


class DatabaseUnavailable(TransientError):
    """The database did not answer in time, rejected a statement, or cannot write."""


class ReceiverUnavailable(TransientError):
    """The receiver elsewhere gave no answer, or another program answered."""


class MediaUnavailable(TransientError):
    """The CDN did not send a whole file this time."""


class MediaMissing(MediaUnavailable):
    """The CDN has no such file (4xx): it is given up after a few attempts."""


class NotMedia(MediaUnavailable):
    """The CDN sent a page or a text in place of an image, a video or audio, which may come later."""


class MediaDoubtful(MediaUnavailable):
    """The CDN sent a whole body, but its container, its size or a digest contradicts it.

    `sha256` (hex) is set if a second, equal body would prove that the file is as intended.
    """

    def __init__(self, message: str, *, reason: str, sha256: str | None) -> None:
        # Not immediately: a cache in between may serve the same body for a moment.
        super().__init__(message, reason=reason, retry_after=5.0)
        self.sha256 = sha256


class StorageUnavailable(TransientError):
    """Our own storage cannot take a file now: full, read-only or unreachable."""


class PublishFailed(TransientError):
    """The destination did not confirm; the message may or may not have arrived.

    `answer` is the start of its answer as text, if there was one.
    """

    def __init__(
        self, message: str, *, reason: str, retry_after: float | None = None, answer: str | None = None
    ) -> None:
        super().__init__(message, reason=reason, retry_after=retry_after)
        self.answer = answer
