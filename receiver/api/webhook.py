"""`POST /clipia/webhook`: store the body of a webhook, then answer.

A request comes through one of two doors: as ASGI from any server, or directly from our protocol, which saves
the scope, the task and the timers of each request (`direct`).
"""

import asyncio
import time
from collections.abc import Iterable
from typing import ClassVar, Final, NamedTuple
from uuid import UUID

import structlog
from starlette.types import Receive, Scope, Send

from receiver.api.answers import CLOSE, HEAD_COMPLETE, Answer, error_body, send_answer
from receiver.core.signature import SIGNATURE_HEADER
from receiver.db.rows import digest_token
from receiver.errors import DatabaseUnavailable, SignatureError
from receiver.ingest import Ingest, Received, SignedRequest
from receiver.metrics import ACK_SECONDS, WEBHOOKS
from receiver.rejections import NO_SOURCE, RawRequest, Rejections
from receiver.settings import DEFAULT_SOURCE

RETRY_AFTER: Final = b"5"

_REQUEST = "invalid_request_error"
# One answer for every failure: a forger must not learn from it how close the forgery was.
_UNAUTHORIZED: Final = Answer(
    401, error_body("authentication_error", "invalid_signature", "The signature could not be verified.")
)
_UNAVAILABLE: Final = Answer(
    503,
    error_body("api_error", "service_unavailable", "The event could not be stored; send it again."),
    ((b"retry-after", RETRY_AFTER),),
)
_NO_SOURCE: Final = Answer(
    404, error_body(_REQUEST, "not_found", "There is no such source; check the webhook's URL."), CLOSE
)
_REJECTIONS: Final = {
    "encoding": Answer(
        415,
        error_body(
            _REQUEST, "unsupported_encoding", "Send the body as it was signed, without Content-Encoding."
        ),
        CLOSE,
    ),
    "too_large": Answer(
        413,
        error_body(_REQUEST, "body_too_large", "The body is larger than RECEIVER_MAX_BODY_BYTES."),
        CLOSE,
    ),
    "too_slow": Answer(
        408,
        error_body(_REQUEST, "body_too_slow", "The body did not arrive in time; send it again."),
        CLOSE,
    ),
}
"""The answers to requests that are rejected before their signature is verified, by reason."""

_CODINGS: Final = frozenset(
    b"br brotli bzip2 compress dcb dcz deflate exi gzip lz4 lzma pack200-gzip snappy xz zlib zstd "
    b"aes128gcm x-bzip2 x-compress x-deflate x-gzip x-lzma x-snappy x-xz x-zstd".split()
)
"""Codings that change a body. Others, such as `utf-8`, do not, and the signature is checked as usual."""

log = structlog.get_logger()


class _RejectedBody(Exception):
    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Disconnected(Exception):
    pass


class Head(NamedTuple):
    """The headers of a request that the endpoint needs."""

    signatures: list[bytes]
    webhook_id: str | None
    is_encoded: bool
    content_length: int | None
    """Of the body, in bytes; None if the request does not declare it."""


def read_head(headers: Iterable[tuple[bytes, bytes]]) -> Head:
    """Read the headers of a request; their names are in lower case."""
    signatures, webhook_id, is_encoded, content_length = [], None, False, None
    for name, value in headers:
        if name == SIGNATURE_HEADER:
            signatures.append(value)
        elif name == b"x-clipia-webhook-id":
            webhook_id = value.decode("ascii", "backslashreplace")[:255]
        elif name == b"content-length":
            content_length = int(value)
        elif name == b"content-encoding":
            is_encoded |= _names_a_coding(value)
    return Head(signatures, webhook_id, is_encoded, content_length)


def raw_request(scope: Scope, body: bytes | None = None) -> RawRequest:
    """Return a rejected request that came through ASGI."""
    client = scope.get("client")
    return RawRequest(scope["path"], scope["headers"], client and client[0], body)


def _names_a_coding(value: bytes) -> bool:
    names = (element.partition(b";")[0].strip(b' \t"').lower() for element in value.split(b","))
    return any(name in _CODINGS for name in names)


class Target(NamedTuple):
    """What a callback path names: a source, and maybe a job."""

    source: str
    job_id: UUID | None = None
    token_digest: str | None = None

    @classmethod
    def read(cls, source: str, job: str) -> "Target":
        """Read the last segment of a job's own path: `<job id>.<token>`. Earlier releases wrote no token."""
        job_id, _, token = job.partition(".")
        # The segment only speeds up finding the job, so an event with an unreadable one is stored, too.
        try:
            return cls(source, UUID(job_id), digest_token(token) if token else None)
        except ValueError:
            return cls(source)

    def request(self, head: Head, body: bytes) -> SignedRequest:
        """Return a request with this head and body."""
        return SignedRequest(
            self.source, head.signatures, body, head.webhook_id, self.job_id, self.token_digest
        )


class WebhookEndpoint:
    """Answers Clipia's webhooks: the ASGI application, and the steps that the direct door shares with it."""

    BODY_SECONDS: ClassVar[float] = 3.0
    """How long the whole body may take, counted from the end of the request's head."""
    ANSWER_SECONDS: ClassVar[float] = 6.5
    """How long the answer may take, from the same moment: time to read the body and try twice to store it.

    Clipia gives up after 10 seconds, and a busy event loop may be late by more than a second.
    """

    def __init__(self, ingest: Ingest, rejections: Rejections, *, max_body_bytes: int) -> None:
        self.ingest: Final = ingest
        self._rejections = rejections
        self.max_body_bytes: Final = max_body_bytes

    def reject(self, source: str, reason: str, request: RawRequest) -> Answer:
        """Count a rejected request, and return its answer."""
        self._rejections.note(source, reason, request)
        return _REJECTIONS.get(reason, _UNAUTHORIZED)

    def answer(self, source: str, received: Received | None, error: Exception | None) -> Answer:
        """Return the answer to a stored request, or else to one that was not stored, which is counted."""
        if received is not None:
            return Answer(
                200,
                b'{"status":"%b","event_id":"%b"}' % (received.outcome.encode(), received.event_id.encode()),
            )
        WEBHOOKS.labels(source, "unavailable").inc()
        if isinstance(error, DatabaseUnavailable):
            log.error("webhook not stored", source=source, reason=error.reason, error=str(error))
        else:
            log.error("webhook not stored", source=source, reason="unexpected", exc_info=error)
        return _UNAVAILABLE

    def late(self) -> DatabaseUnavailable:
        """Return the error of a request that was not stored before its deadline."""
        return DatabaseUnavailable(f"not stored within {self.ANSWER_SECONDS} s", reason="timeout")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began = time.perf_counter()
        path = scope.get("path_params", {})
        source = path.get("source", DEFAULT_SOURCE)
        if source not in self.ingest.sources:
            self._rejections.note(NO_SOURCE, "unknown_source", raw_request(scope))
            await send_answer(send, _NO_SOURCE)
            return
        head_complete = scope.get("state", {}).get(HEAD_COMPLETE) or asyncio.get_running_loop().time()
        target = Target.read(source, path["job"]) if "job" in path else Target(source)
        try:
            answer = await self._serve(target, scope, receive, head_complete)
        except _Disconnected:
            return
        await send_answer(send, answer)
        ACK_SECONDS.observe(time.perf_counter() - began)

    async def _serve(self, target: Target, scope: Scope, receive: Receive, head_complete: float) -> Answer:
        """Read a webhook and store it, both before their deadlines; return its answer."""
        head = read_head(scope["headers"])
        try:
            async with asyncio.timeout_at(head_complete + self.BODY_SECONDS):
                body = await self._read(receive, head)
        except _RejectedBody as rejected:
            return self.reject(target.source, rejected.reason, raw_request(scope))
        except TimeoutError:
            return self.reject(target.source, "too_slow", raw_request(scope))
        deadline = asyncio.timeout_at(head_complete + self.ANSWER_SECONDS)
        try:
            async with deadline:
                received = await self.ingest.receive(target.request(head, body))
        except SignatureError as error:
            return self.reject(target.source, error.reason, raw_request(scope, body))
        except Exception as error:  # noqa: BLE001 - each error has an answer
            return self.answer(target.source, None, self.late() if deadline.expired() else error)
        return self.answer(target.source, received, None)

    async def _read(self, receive: Receive, head: Head) -> bytes:
        """Return the whole body.

        Raises _RejectedBody if it is over the limit, without reading it if Content-Length says so.
        """
        if head.is_encoded:
            raise _RejectedBody("encoding")
        if (head.content_length or 0) > self.max_body_bytes:
            raise _RejectedBody("too_large")
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self.max_body_bytes:
                raise _RejectedBody("too_large")
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)
