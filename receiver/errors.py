"""The exception tree.

::

    ReceiverError
    ├── SettingsError            a setting is missing or wrong; the message says which and what to write
    ├── SignatureError           a webhook whose signature or freshness does not hold (`reason`)
    ├── UnrecognizedBody         an authentic body that cannot be used as an event (`reason`)
    ├── PermanentError           trying again cannot help (`reason`)
    │   ├── MediaBlocked         the guard refused a URL, an address or a file
    │   └── PublishRejected      the destination refused this message for good
    └── TransientError           trying again later may help (`reason`, `retry_after`)
        ├── DatabaseUnavailable
        ├── MediaUnavailable     the CDN did not give a whole file
        │   └── MediaMissing     it says that there is none (404 and the like): given up after few tries
        ├── StorageUnavailable   our own storage cannot take a file (full, unreachable)
        └── PublishFailed        the destination did not confirm

Data travels as attributes; nothing parses messages. `reason` is a short fixed word, fit for a metric's label.
"""


class ReceiverError(Exception):
    """Base of everything that this package raises on purpose."""


class SettingsError(ReceiverError):
    """A setting is missing or wrong; the message is for the operator and says what to do."""


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


class DatabaseUnavailable(TransientError):  # noqa: N818 - states a condition
    """The database did not answer in time, refused, or cannot write."""


class MediaUnavailable(TransientError):  # noqa: N818 - states a condition
    """The CDN did not deliver a whole file this time."""


class MediaMissing(MediaUnavailable):
    """The CDN says that there is no such file (4xx): worth a few tries, then given up as gone."""


class StorageUnavailable(TransientError):  # noqa: N818 - states a condition
    """Our own storage cannot take a file now: full, read-only or unreachable."""


class PublishFailed(TransientError):  # noqa: N818 - states a condition
    """The destination did not confirm; the message may or may not have arrived."""
