"""`POST /clipia/webhook`: store the body of a webhook, then answer."""

import asyncio
import time
from collections.abc import Iterable
from typing import Final, NamedTuple, cast
from uuid import UUID

import structlog
from starlette.types import Receive, Scope, Send

from receiver.api.answers import CLOSE, HEAD_COMPLETE, Headers, error_body, send_json
from receiver.api.rejections import NO_SOURCE, Rejections
from receiver.core.signature import SIGNATURE_HEADER
from receiver.db.rows import digest_token
from receiver.errors import DatabaseUnavailable, SignatureError
from receiver.ingest import Ingest, Received
from receiver.metrics import ACK_SECONDS, WEBHOOKS
from receiver.settings import DEFAULT_SOURCE

BODY_SECONDS: Final = 3.0
"""How long the whole body may take, counted from the end of the request's head."""
ANSWER_SECONDS: Final = 6.5
"""How long the answer may take, from the same moment: time to read the body and try twice to store it.

Clipia gives up after 10 seconds, and a busy event loop may be late by more than a second.
"""
RETRY_AFTER: Final = b"5"

_LATE: Final = "deadline"
"""The message of a cancellation by a deadline."""

_REQUEST = "invalid_request_error"
# One answer for every failure: a forger must not learn from it how close the forgery was.
_UNAUTHORIZED = error_body(
    "authentication_error", "invalid_signature", "The signature could not be verified."
)
_UNAVAILABLE = error_body("api_error", "service_unavailable", "The event could not be stored; send it again.")
_ENCODED = error_body(
    _REQUEST, "unsupported_encoding", "Send the body as it was signed, without Content-Encoding."
)
_TOO_LARGE = error_body(_REQUEST, "body_too_large", "The body is larger than RECEIVER_MAX_BODY_BYTES.")
_TOO_SLOW = error_body(_REQUEST, "body_too_slow", "The body did not arrive in time; send it again.")
_NO_SOURCE = error_body(_REQUEST, "not_found", "There is no such source; check the webhook's URL.")

_CODINGS: Final = frozenset(
    b"br brotli bzip2 compress dcb dcz deflate exi gzip lz4 lzma pack200-gzip snappy xz zlib zstd "
    b"aes128gcm x-bzip2 x-compress x-deflate x-gzip x-lzma x-snappy x-xz x-zstd".split()
)
"""Codings that change a body. Others, such as `utf-8`, do not, and the signature is checked as usual."""

_Answer = tuple[int, bytes | dict[str, str], Headers]
_NOT_STORED: Final[_Answer] = (503, _UNAVAILABLE, ((b"retry-after", RETRY_AFTER),))

log = structlog.get_logger()


class _RejectedBody(Exception):
    def __init__(self, status: int, reason: str, body: bytes) -> None:
        self.status = status
        self.reason = reason
        self.body = body


class _Disconnected(Exception):
    pass


class _Head(NamedTuple):
    """The headers of a request that the endpoint needs."""

    signatures: list[bytes]
    webhook_id: str | None
    encoded: bool
    content_length: int
    """Of the body, in bytes; 0 if the request does not declare it."""


def _read_head(headers: Iterable[tuple[bytes, bytes]]) -> _Head:
    signatures, webhook_id, encoded, content_length = [], None, False, 0
    for name, value in headers:
        if name == SIGNATURE_HEADER:
            signatures.append(value)
        elif name == b"x-clipia-webhook-id":
            webhook_id = value.decode("ascii", "backslashreplace")[:255]
        elif name == b"content-length":
            content_length = int(value)
        elif name == b"content-encoding":
            encoded |= _names_a_coding(value)
    return _Head(signatures, webhook_id, encoded, content_length)


def _names_a_coding(value: bytes) -> bool:
    names = (element.partition(b";")[0].strip(b' \t"').lower() for element in value.split(b","))
    return any(name in _CODINGS for name in names)


class _JobPath(NamedTuple):
    """The last segment of a job's own path: `<job id>.<token>`. Earlier releases wrote no token."""

    job_id: UUID | None = None
    token_digest: str | None = None

    @classmethod
    def read(cls, text: str | None) -> "_JobPath":
        job_id, _, token = (text or "").partition(".")
        # The segment only speeds up finding the job, so an event with an unreadable one is stored, too.
        try:
            return cls(UUID(job_id), digest_token(token) if token else None)
        except ValueError:
            return cls()


class _Deadline:
    """Cancels the task of a request if its body is late, or else if its answer is.

    Two blocks of asyncio.timeout would do the same. They cost each webhook 4 µs more: this has one timer for
    both deadlines.
    """

    def __init__(self, head_complete: float | None) -> None:
        """`head_complete` is the event loop's time at the end of the request's head; None is now."""
        self._loop = asyncio.get_running_loop()
        self._task = cast("asyncio.Task[None]", asyncio.current_task())
        self._began = self._loop.time() if head_complete is None else head_complete
        self._timer = self._loop.call_at(self._began + BODY_SECONDS, self._expire)
        self.has_body = False

    def _expire(self) -> None:
        answer_at = self._began + ANSWER_SECONDS
        if self.has_body and self._loop.time() < answer_at:
            self._timer = self._loop.call_at(answer_at, self._expire)
        else:
            self._task.cancel(_LATE)

    def has_passed(self, cancelled: asyncio.CancelledError) -> bool:
        """Return whether this deadline cancelled the task; False if anything else did as well."""
        return cancelled.args == (_LATE,) and not self._task.uncancel()

    def stop(self) -> None:
        """Cancel the timer."""
        self._timer.cancel()
        # The timer refers to this object: without the cycle, reference counting frees both at once.
        del self._timer


class WebhookEndpoint:
    """The ASGI application that answers Clipia's webhooks."""

    def __init__(self, ingest: Ingest, rejections: Rejections, *, max_body_bytes: int) -> None:
        self._ingest = ingest
        self._max_body_bytes = max_body_bytes
        self._rejections = rejections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began = time.perf_counter()
        path = scope.get("path_params", {})
        source = path.get("source", DEFAULT_SOURCE)
        if not self._ingest.has_source(source):
            self._rejections.note(NO_SOURCE, "unknown_source", path=scope["path"])
            await send_json(send, 404, _NO_SOURCE, CLOSE)
            return
        deadline = _Deadline(scope.get("state", {}).get(HEAD_COMPLETE))
        try:
            status, body, headers = await self._answer(
                source, _JobPath.read(path.get("job")), scope["headers"], receive, deadline
            )
        except _Disconnected:
            return
        finally:
            deadline.stop()
        await send_json(send, status, body, headers)
        ACK_SECONDS.observe(time.perf_counter() - began)

    async def _answer(
        self,
        source: str,
        job_path: _JobPath,
        headers: Iterable[tuple[bytes, bytes]],
        receive: Receive,
        deadline: _Deadline,
    ) -> _Answer:
        try:
            received = await self._receive(source, job_path, _read_head(headers), receive, deadline)
        except _RejectedBody as rejected:
            self._rejections.note(source, rejected.reason)
            return rejected.status, rejected.body, CLOSE
        except SignatureError as error:
            self._rejections.note(source, error.reason)
            return 401, _UNAUTHORIZED, ()
        except DatabaseUnavailable as error:
            WEBHOOKS.labels(source, "unavailable").inc()
            log.error("webhook not stored", source=source, reason=error.reason, error=str(error))
            return _NOT_STORED
        except _Disconnected:
            raise
        except Exception:
            WEBHOOKS.labels(source, "unavailable").inc()
            log.exception("webhook not stored", source=source, reason="unexpected")
            return _NOT_STORED
        return 200, {"status": received.outcome, "event_id": str(received.event_id)}, ()

    async def _receive(
        self, source: str, job_path: _JobPath, head: _Head, receive: Receive, deadline: _Deadline
    ) -> Received:
        """Read a webhook and store it, both before the deadline."""
        try:
            body = await self._read(receive, head)
            deadline.has_body = True
            return await self._ingest.receive(
                source,
                signatures=head.signatures,
                body=body,
                webhook_id=head.webhook_id,
                job_id=job_path.job_id,
                path_token=job_path.token_digest,
            )
        except asyncio.CancelledError as cancelled:
            if not deadline.has_passed(cancelled):
                raise
            if deadline.has_body:
                raise DatabaseUnavailable(f"not stored within {ANSWER_SECONDS} s", reason="timeout") from None
            raise _RejectedBody(408, "too_slow", _TOO_SLOW) from None

    async def _read(self, receive: Receive, head: _Head) -> bytes:
        """Return the whole body.

        Raises _RejectedBody if it is over the limit, without reading it if Content-Length says so.
        """
        if head.encoded:
            raise _RejectedBody(415, "encoding", _ENCODED)
        if head.content_length > self._max_body_bytes:
            raise _RejectedBody(413, "too_large", _TOO_LARGE)
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                raise _RejectedBody(413, "too_large", _TOO_LARGE)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)
