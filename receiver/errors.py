"""The exception tree.

::

    ReceiverError
    ├── SettingsError            a setting is missing or wrong; the message says which and what to write
    │   └── UnusableFileError    a file that a setting names cannot be read or used; it may come later
    ├── SignatureError           a webhook whose signature or freshness does not hold (`reason`)
    ├── UnrecognizedBody         an authentic body that cannot be used as an event (`reason`)
    ├── PermanentError           trying again cannot help (`reason`)
    │   ├── RequestError         a job or a call is invalid, or its state does not allow it (`code`, `type`)
    │   │   ├── RequestTooLarge
    │   │   └── RefusedByClipia  Clipia refuses a job or a call for good (`status`)
    │   ├── MediaBlocked         the guard refused a URL, an address or a file
    │   └── PublishRejected      the destination refused this message for good
    └── TransientError           trying again later may help (`reason`, `retry_after`)
        ├── ClipiaUnavailable    the API did not answer, or not usably (`may_have_arrived`)
        │   ├── AccountRefused   401: it is the account's trouble, not the job's
        │   └── RefusedForNow    402, 403: Clipia refuses this job as the account stands now (`type`)
        ├── DatabaseUnavailable
        ├── MediaUnavailable     the CDN did not give a whole file
        │   ├── MediaMissing     it says that there is none (404 and the like): given up after few tries
        │   ├── NotMedia         a page or a text in place of a file: not there yet
        │   └── MediaDoubtful    all of a body came, and something contradicts it (`sha256`)
        ├── StorageUnavailable   our own storage cannot take a file (full, unreachable)
        └── PublishFailed        the destination did not confirm

Data travels as attributes; nothing parses messages. `reason` is a short fixed word, fit for a metric's label.
"""

from typing import Literal

SignatureReason = Literal["missing", "ambiguous", "format", "mismatch", "stale", "future"]
"""In the order of the checks."""
BodyReason = Literal["not_json", "not_object", "duplicate_key", "request_id", "status"]


class ReceiverError(Exception):
    """Base of everything that this package raises on purpose."""


class SettingsError(ReceiverError):
    """A setting is missing or wrong; the message is for the operator and says what to do."""


class UnusableFileError(SettingsError):
    """A file that a setting names cannot be read, or does not hold what it should: it may come later."""


class SignatureError(ReceiverError):
    """A webhook's signature or freshness does not hold.

    `reason` is for metrics and logs only. A caller must answer every one of them alike.
    """

    def __init__(self, reason: SignatureReason) -> None:
        super().__init__(reason)
        self.reason = reason


class UnrecognizedBody(ReceiverError):
    """An authentic body that is not a usable event: not JSON, no `request_id`, an unknown status."""

    def __init__(self, reason: BodyReason) -> None:
        super().__init__(reason)
        self.reason = reason


class PermanentError(ReceiverError):
    """Trying again cannot help."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RequestError(PermanentError):
    """A job or a call is invalid, or the state of its object does not allow it.

    `code` says which of these; `api.answers` has the HTTP status of each code. `type` is as in Clipia's own
    errors. `job_id` is the job's, if one was made.
    """

    def __init__(
        self, message: str, *, code: str, type_: str = "invalid_request_error", job_id: str | None = None
    ) -> None:
        super().__init__(message, reason=code)
        self.type = type_
        self.code = code
        self.job_id = job_id


class RequestTooLarge(RequestError):
    """A body has more bytes than the receiver or Clipia takes."""


class RefusedByClipia(RequestError):
    """Clipia refuses a job or a call for good; `status`, `type` and `code` are those of its answer."""

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
    """The media guard refused a URL, an address, a redirect or a file."""


class PublishRejected(PermanentError):
    """The destination refused this message for good."""


class TransientError(ReceiverError):
    """Trying again later may help. `retry_after` is in seconds, where the other side named one."""

    def __init__(self, message: str, *, reason: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class ClipiaUnavailable(TransientError):
    """The Clipia API did not answer, refused for now, or answered what nobody can use.

    `reason` is Clipia's code where it gave one. Unless `may_have_arrived` is False, the request may have been
    carried out.
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
    """Clipia refuses the account (401): no job is at fault, and none should end for it."""


class RefusedForNow(ClipiaUnavailable):
    """Clipia refuses a job for its price, its model or the key's scopes (402, 403).

    It says nothing about other jobs. After a top-up, a new plan or another scope Clipia may take this one.
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
    """The database did not answer in time, refused, or cannot write."""


class MediaUnavailable(TransientError):
    """The CDN did not deliver a whole file this time."""


class MediaMissing(MediaUnavailable):
    """The CDN says that there is no such file (4xx): worth a few tries, then given up as gone."""


class NotMedia(MediaUnavailable):
    """The CDN sent a page or a text where an image, a video or audio was announced: not there yet."""


class MediaDoubtful(MediaUnavailable):
    """The CDN sent a whole body, but its container, its size or a digest contradicts it.

    `sha256` (hex) is the body's if a second body that is the same settles the doubt.
    """

    def __init__(self, message: str, *, reason: str, sha256: str | None) -> None:
        # Soon, but not at once: a cache in between may need a moment to notice.
        super().__init__(message, reason=reason, retry_after=5.0)
        self.sha256 = sha256


class StorageUnavailable(TransientError):
    """Our own storage cannot take a file now: full, read-only or unreachable."""


class PublishFailed(TransientError):
    """The destination did not confirm; the message may or may not have arrived."""
