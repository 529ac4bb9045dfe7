"""The exception tree.

::

    ReceiverError
    ├── SettingsError            a setting is missing or wrong; the message says which and what to write
    │   └── UnusableFileError    a file that a setting names cannot be read or used; it may come later
    ├── SignatureError           a webhook whose signature or freshness does not hold (`reason`)
    ├── UnrecognizedBody         an authentic body that cannot be used as an event (`reason`)
    ├── PermanentError           trying again cannot help (`reason`)
    │   ├── Refused              a job or a call that Clipia or we turn down (`status`, `type`, `code`)
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

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnrecognizedBody(ReceiverError):  # noqa: N818 - the event's state is called `unrecognized`
    """An authentic body that is not a usable event: not JSON, no `request_id`, an unknown status."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PermanentError(ReceiverError):
    """Trying again cannot help."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Refused(PermanentError):  # noqa: N818 - a verdict
    """A job or a call that Clipia, or this service in its place, turns down for good.

    `status`, `type` and `code` are as in Clipia's own errors; `job_id` is the job's where one was made.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        status: int,
        type_: str = "invalid_request_error",
        job_id: str | None = None,
    ) -> None:
        super().__init__(message, reason=code)
        self.status = status
        self.type = type_
        self.code = code
        self.job_id = job_id


class MediaBlocked(PermanentError):  # noqa: N818 - the media row's state is called `blocked`
    """The media guard refused a URL, an address, a redirect or a file."""


class PublishRejected(PermanentError):  # noqa: N818 - a verdict, like its siblings
    """The destination refused this message for good."""


class TransientError(ReceiverError):
    """Trying again later may help. `retry_after` is in seconds, where the other side named one."""

    def __init__(self, message: str, *, reason: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class ClipiaUnavailable(TransientError):  # noqa: N818 - states a condition
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


class DatabaseUnavailable(TransientError):  # noqa: N818 - states a condition
    """The database did not answer in time, refused, or cannot write."""


class MediaUnavailable(TransientError):  # noqa: N818 - states a condition
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


class StorageUnavailable(TransientError):  # noqa: N818 - states a condition
    """Our own storage cannot take a file now: full, read-only or unreachable."""


class PublishFailed(TransientError):  # noqa: N818 - states a condition
    """The destination did not confirm; the message may or may not have arrived."""
