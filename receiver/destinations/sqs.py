"""`sqs:`: one message per event, the event in structured JSON, up to ten of them per request.

`sqs://sqs.<region>.amazonaws.com/<account>/<queue>` is the queue's own URL with another scheme; add
`?endpoint=https://host&region=name` for a server that is not Amazon's. Credentials are where every AWS client
looks for them: `AWS_…`, a profile, the machine's role. In a FIFO queue (`….fifo`) the event's subject is the
message group and the delivery's id the deduplication id.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import structlog
from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import get_session  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    TokenRetrievalError,
)
from cloudevents.core.v1.event import CloudEvent

from receiver.destinations.base import closed, encode
from receiver.errors import PublishFailed, PublishRejected, SettingsError
from receiver.settings import DestinationSettings

TIMEOUT: Final = 15.0
"""Seconds for a whole publish, from waiting for its batch to the answer."""
CONNECT_TIMEOUT: Final = 5
READ_TIMEOUT: Final = 10
TRIES: Final = 2
"""Requests per batch: one more where a connection turns out to be dead or the service asks to slow down."""
MAX_ENTRIES: Final = 10
MAX_BATCHES: Final = 8
"""Requests in flight at once."""
MAX_MESSAGE: Final = 1024 * 1024
"""Bytes of body and attributes (SQS Developer Guide, message quotas; 256 KiB until August 2025)."""
MAX_BATCH: Final = 256 * 1024
"""Bytes that go together. Amazon takes 1 MiB, other servers this; a larger message goes alone."""
MAX_TEXT: Final = 200
"""Characters of the service's words in a message."""

_HOST: Final = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.)*[A-Za-z0-9-]{1,63}(?::[0-9]{1,5})?")
_REGION: Final = re.compile(r"(?:.*\.)?sqs(?:-fips)?\.([a-z]{2,}(?:-[a-z]+)+-[0-9]+)\..+")
_REGION_NAME: Final = re.compile(r"[a-z0-9-]{1,63}")
_PATH: Final = re.compile(r"/[0-9]{12}/(?=.{1,80}$)[A-Za-z0-9_-]+(?:\.fifo)?")
_FIFO_ID: Final = re.compile(r"[!-~]{1,128}")
_ABOUT_A_MESSAGE: Final = frozenset(
    {"BatchRequestTooLong", "InvalidMessageContents", "InvalidParameterValue"}
)
_AUTH: Final = ("auth", "see AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and the clock")
_PERMISSION: Final = (
    "permission",
    "allow sqs:SendMessage and, for the check, sqs:GetQueueAttributes; for an encrypted queue its key, too",
)
_NO_QUEUE: Final = ("no_queue", "there is no such queue: create it")
_THROTTLED: Final = ("throttled", "the service asks to slow down")
_ADVICE: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "QueueDoesNotExist": _NO_QUEUE,
        "NonExistentQueue": _NO_QUEUE,
        "AccessDenied": _PERMISSION,
        "AccessDeniedException": _PERMISSION,
        "KmsAccessDenied": _PERMISSION,
        "ExpiredToken": _AUTH,
        "ExpiredTokenException": _AUTH,
        "InvalidClientTokenId": _AUTH,
        "InvalidSecurity": _AUTH,
        "InvalidSignatureException": _AUTH,
        "SignatureDoesNotMatch": _AUTH,
        "UnrecognizedClientException": _AUTH,
        "KmsThrottled": _THROTTLED,
        "RequestThrottled": _THROTTLED,
        "Throttling": _THROTTLED,
        "ThrottlingException": _THROTTLED,
    }
)
_NO_CREDENTIALS: Final = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
)

_Failure = PublishFailed | PublishRejected

log = structlog.get_logger()

# At DEBUG it logs whole events and the headers that sign for us, session tokens among them.
_library_log = logging.getLogger("botocore")
if _library_log.level == logging.NOTSET:
    _library_log.setLevel(logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class _Queue:
    """What a URL says."""

    url: str
    endpoint: str
    region: str

    @property
    def is_fifo(self) -> bool:
        """Whether messages have groups and are deduplicated."""
        return self.url.endswith(".fifo")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One event on its way; `outcome` is what `publish` has to raise, or None."""

    message: Mapping[str, Any]
    size: int
    deadline: float = field(default_factory=lambda: asyncio.get_running_loop().time() + TIMEOUT)
    outcome: asyncio.Future[_Failure | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class SqsDestination:
    """Sends events to an SQS queue.

    Events that come while others are on their way gather for the next batch; each has an answer of its own.
    """

    concurrency = MAX_ENTRIES * MAX_BATCHES

    def __init__(self, settings: DestinationSettings) -> None:
        self._name = settings.name
        self._queue = _parse(settings)
        self._waiting: deque[_Entry] = deque()
        self._senders: set[asyncio.Task[None]] = set()
        self._clients = contextlib.AsyncExitStack()
        self._client: Any = None
        self._opening = asyncio.Lock()
        self._max_message = MAX_MESSAGE
        self._closed = False

    async def start(self) -> None:
        """Check, and only warn: the queue may come later."""
        try:
            await self.check()
        except PublishFailed as error:
            log.warning("destination is not ready", destination=self._name, error=str(error))

    async def check(self) -> None:
        """Ask for the queue's attributes."""
        if self._closed:
            raise closed()
        try:
            async with asyncio.timeout(TIMEOUT):
                client = await self._open()
                answer = await client.get_queue_attributes(
                    QueueUrl=self._queue.url, AttributeNames=["MaximumMessageSize"]
                )
        except (TimeoutError, BotoCoreError, ClientError) as error:
            raise self._failed(error) from error
        self._max_message = int(answer.get("Attributes", {}).get("MaximumMessageSize", MAX_MESSAGE))
        if self._max_message < MAX_BATCH:
            problem = f"larger messages than {self._max_message} bytes are rejected: raise MaximumMessageSize"
            log.warning("the destination may lose events", destination=self._name, problem=problem)

    async def publish(self, event: CloudEvent) -> None:
        """Send the event and return when the service has answered that it has it."""
        entry = self._make_entry(event)
        if self._closed:
            raise closed()
        self._waiting.append(entry)
        if len(self._senders) < MAX_BATCHES:
            self._senders.add(asyncio.create_task(self._send_waiting()))
        try:
            async with asyncio.timeout_at(entry.deadline):
                failure = await entry.outcome
        except TimeoutError as error:
            raise self._failed(error) from error
        if failure is not None:
            # The others of the batch may have been given the same one.
            raise type(failure)(str(failure), reason=failure.reason)

    async def close(self) -> None:
        """Send what waits, which the timeout bounds, and close the connections."""
        self._closed = True
        if self._senders:
            await asyncio.wait(self._senders)
        await self._clients.aclose()

    async def _open(self) -> Any:
        """Return the client, once there are credentials for it. Raises what the library raises."""
        async with self._opening:
            if self._client is None:
                session = get_session()
                # A client that is made without keeps none for ever.
                if await session.get_credentials() is None:
                    raise NoCredentialsError
                self._client = await self._clients.enter_async_context(
                    session.create_client(
                        "sqs",
                        region_name=self._queue.region,
                        endpoint_url=self._queue.endpoint,
                        config=AioConfig(
                            connect_timeout=CONNECT_TIMEOUT,
                            read_timeout=READ_TIMEOUT,
                            retries={"mode": "standard", "total_max_attempts": TRIES},
                        ),
                    )
                )
            return self._client

    async def _send_waiting(self) -> None:
        try:
            while batch := self._take():
                await self._send(batch)
        finally:
            # Not by a callback: who publishes before that runs would wait for a sender that has ended.
            self._senders.discard(asyncio.current_task())

    def _take(self) -> list[_Entry]:
        """Take the next batch from the queue, without what nobody waits for any more."""
        batch: list[_Entry] = []
        room = MAX_BATCH
        while self._waiting and len(batch) < MAX_ENTRIES:
            entry = self._waiting[0]
            if not entry.outcome.done():
                if batch and entry.size > room:
                    break
                batch.append(entry)
                room -= entry.size
            self._waiting.popleft()
        return batch

    async def _send(self, batch: list[_Entry]) -> None:
        """Send a batch and give each of its entries its outcome."""
        rest: _Failure = PublishFailed(f"{self._queue.url}: not confirmed", reason="unconfirmed")
        outcomes: Mapping[str, _Failure | None] = {}
        try:
            async with asyncio.timeout_at(max(entry.deadline for entry in batch)):
                outcomes = await self._ask(batch)
        except ClientError as error:
            if _code(error) not in _ABOUT_A_MESSAGE:
                rest = self._failed(error)
            elif len(batch) == 1:
                rest = self._judge(_code(error), "", batch[0])
            else:
                # One of them has spoilt it for all, and nobody says which.
                await asyncio.gather(*(self._send([entry]) for entry in batch))
        except (TimeoutError, BotoCoreError) as error:
            rest = self._failed(error)
        finally:
            for number, entry in enumerate(batch):
                if not entry.outcome.done():
                    entry.outcome.set_result(outcomes.get(str(number), rest))

    async def _ask(self, batch: list[_Entry]) -> dict[str, _Failure | None]:
        """Return the outcomes by the number in the batch. Raises what the library raises."""
        client = await self._open()
        answer = await client.send_message_batch(
            QueueUrl=self._queue.url,
            Entries=[{"Id": str(number), **entry.message} for number, entry in enumerate(batch)],
        )
        outcomes = {taken["Id"]: None for taken in answer.get("Successful", ())}
        refused = {
            each["Id"]: self._judge(each.get("Code", ""), each.get("Message", ""), batch[int(each["Id"])])
            for each in answer.get("Failed", ())
        }
        return outcomes | refused

    def _failed(self, error: TimeoutError | BotoCoreError | ClientError) -> PublishFailed:
        url = self._queue.url
        if isinstance(error, ClientError):
            # Its text may quote what was signed, session token and all.
            reason, advice = _ADVICE.get(_code(error), ("refused", "the request is refused"))
            return PublishFailed(f"{url}: {_code(error)}: {advice}", reason=reason)
        if isinstance(error, TimeoutError):
            return PublishFailed(f"{url} did not answer within {TIMEOUT:g} s", reason="timeout")
        if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
            return PublishFailed(f"{url}: {error}", reason="timeout")
        if isinstance(error, _NO_CREDENTIALS):
            return PublishFailed(
                f"{url}: {error}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give "
                "the machine a role",
                reason="auth",
            )
        return PublishFailed(f"{url}: {error}", reason="connection")

    def _judge(self, code: str, text: str, entry: _Entry) -> _Failure:
        """Return what the refusal of one message means."""
        url = self._queue.url
        if code == "InvalidMessageContents":
            return PublishRejected(f"{url} takes no such text", reason="content")
        if code in _ABOUT_A_MESSAGE and (code == "BatchRequestTooLong" or entry.size > self._max_message):
            return PublishRejected(f"{url} takes no message of {entry.size} bytes", reason="too_large")
        reason, advice = _ADVICE.get(code, ("refused", text[:MAX_TEXT]))
        return PublishFailed(f"{url}: {code}: {advice}", reason=reason)

    def _make_entry(self, event: CloudEvent) -> _Entry:
        body = encode(event).decode("ascii")
        delivery_id = str(event.get_extension("deliveryid") or event.get_id())
        ids = {"id": str(event.get_id()), "deliveryid": delivery_id}
        message: dict[str, Any] = {
            "MessageBody": body,
            "MessageAttributes": {
                name: {"DataType": "String", "StringValue": value} for name, value in ids.items()
            },
        }
        if self._queue.is_fifo:
            message["MessageGroupId"] = _fifo_id(event.get_subject() or delivery_id)
            message["MessageDeduplicationId"] = _fifo_id(delivery_id)
        size = len(body) + sum(
            len(name) + len("String") + len(value.encode("utf-8", "surrogatepass"))
            for name, value in ids.items()
        )
        if size > MAX_MESSAGE:
            raise PublishRejected(
                f"SQS takes messages of at most {MAX_MESSAGE} bytes, not of {size}", reason="too_large"
            )
        return _Entry(message=message, size=size)


def _code(error: ClientError) -> str:
    """Return the error's name; older protocols put a name space before it."""
    code: str = error.response.get("Error", {}).get("Code", "")
    return code.rpartition(".")[2]


def _fifo_id(text: str) -> str:
    """Return the text where SQS takes it for a group or an id, and its digest where not."""
    return (
        text
        if _FIFO_ID.fullmatch(text)
        else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    )


def _parse(settings: DestinationSettings) -> _Queue:
    wrong = SettingsError(
        f"destination {settings.name!r}: write sqs://sqs.<region>.amazonaws.com/<account>/<queue>, "
        "?endpoint=https://host&region=name as needed; credentials belong in AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY"
    )
    try:
        parts = urlsplit(settings.url.get_secret_value())
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        options = dict(pairs)
        endpoint = urlsplit(options.get("endpoint", f"https://{parts.netloc}"))
    except ValueError:
        # The error would quote the URL.
        raise wrong from None
    found = _REGION.fullmatch(parts.netloc)
    region = options.get("region", found[1] if found else "")
    if (
        not _HOST.fullmatch(parts.netloc)
        or not _PATH.fullmatch(parts.path)
        or parts.fragment
        or len(options) != len(pairs)
        or not options.keys() <= {"endpoint", "region"}
        or not _REGION_NAME.fullmatch(region)
        or endpoint.scheme not in {"https", "http"}
        or not _HOST.fullmatch(endpoint.netloc)
        or endpoint.path not in {"", "/"}
        or endpoint.query
        or endpoint.fragment
    ):
        raise wrong
    origin = f"{endpoint.scheme}://{endpoint.netloc}"
    return _Queue(url=origin + parts.path, endpoint=origin, region=region)
