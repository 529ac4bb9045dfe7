"""`sqs:`: one message per event, the event in structured JSON, up to ten of them per request.

`sqs://sqs.<region>.amazonaws.com/<account>/<queue>` is the queue's own URL with another scheme, of Amazon or
another service. `?endpoint=https://host` or `AWS_ENDPOINT_URL` replaces its host for requests, and `region=`
or `AWS_REGION` names the region if the host does not. Credentials come from the places that every AWS client
reads: `AWS_…`, a profile, the machine's role. In a FIFO queue (`….fifo`) the event's subject is the message
group and the delivery's id the deduplication id.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import (
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

from receiver.config_file import aws_endpoint, aws_region
from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import (
    CheckedDestination,
    Failure,
    closed_failure,
    encode,
    limit_log,
    quoted,
    step_timeout,
    timeout_failure,
)
from receiver.destinations.batches import BatchPublisher
from receiver.destinations.tls import open_tls
from receiver.destinations.urls import split_url, usable_url
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected, SettingsError

CONNECT_SECONDS: Final = 5
READ_SECONDS: Final = 10
MAX_ATTEMPTS: Final = 2
"""Requests per batch: a second one if the connection is dead or the service throttles."""
MAX_ENTRIES: Final = 10
MAX_BATCHES: Final = 8
"""Requests in flight at once."""
MAX_MESSAGE_BYTES: Final = 1024 * 1024
"""The limit of body and attributes (SQS Developer Guide, message quotas; 256 KiB until August 2025)."""
MAX_BATCH_BYTES: Final = 256 * 1024
"""The limit of a batch. Amazon takes 1 MiB, other servers this; a larger message goes alone."""

_REGION: Final = re.compile(
    r"(?:.*\.)?sqs(?:-fips)?\.(?P<new>[a-z]{2,}(?:-[a-z]+)+-[0-9]+)\..+|"
    r"(?P<old>[a-z]{2,}(?:-[a-z]+)+-[0-9]+)\.queue\..+"
)
_REGION_NAME: Final = re.compile(r"[a-z0-9-]{1,63}")
_AMAZON: Final = re.compile(r".*\.amazonaws\.com(?:\.cn)?")
_QUEUE: Final = r"(?=[^/]{1,80}$)[A-Za-z0-9_-]+(?:\.fifo)?"
_AMAZON_PATH: Final = re.compile(rf"/[0-9]{{12}}/{_QUEUE}")
_PATH: Final = re.compile(rf"(?:/[A-Za-z0-9._~-]{{1,128}}){{0,4}}/{_QUEUE}")
"""Other services have letters, projects or folders before the queue's name, or none of them."""
_ENDPOINT_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~-]{1,128}){0,4}/?")
_FIFO_ID: Final = re.compile(r"[!-~]{1,128}")
_ABOUT_A_MESSAGE: Final = {"BatchRequestTooLong", "InvalidMessageContents", "InvalidParameterValue"}
_AUTH: Final = (
    "auth",
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role, and the clock",
)
_PERMISSION: Final = (
    "permission",
    "allow sqs:SendMessage and, for the check, sqs:GetQueueAttributes; for an encrypted queue its key's use",
)
_NO_QUEUE: Final = ("no_queue", "the queue does not exist: create it")
_THROTTLED: Final = ("throttled", "the service throttles requests")
_CODES: Final = (
    ("QueueDoesNotExist NonExistentQueue", _NO_QUEUE),
    ("AccessDenied AccessDeniedException KmsAccessDenied", _PERMISSION),
    ("ExpiredToken ExpiredTokenException InvalidClientTokenId InvalidSecurity", _AUTH),
    ("InvalidSignatureException SignatureDoesNotMatch UnrecognizedClientException", _AUTH),
    ("KmsThrottled RequestThrottled Throttling ThrottlingException", _THROTTLED),
)
_ADVICE: Final = {code: advice for codes, advice in _CODES for code in codes.split()}
_NO_CREDENTIALS: Final = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
)

# At DEBUG it logs whole events and signed headers, with session tokens.
limit_log("botocore", logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class _Queue:
    """The queue of a URL, and the endpoint that serves it."""

    url: str
    endpoint: str
    region: str

    @property
    def is_fifo(self) -> bool:
        """Whether messages have groups and are deduplicated."""
        return self.url.endswith(".fifo")


@dataclass(frozen=True, kw_only=True)
class _Message:
    """One entry of a batch, without its number."""

    fields: Mapping[str, Any]
    size: int


class SqsDestination(CheckedDestination):
    """Sends events to an SQS queue; events that arrive together share a request."""

    concurrency = MAX_ENTRIES * MAX_BATCHES

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._queue = _parse(settings)
        self._options = _client_options(settings)
        self._batches = BatchPublisher(
            self._send,
            shown=self._queue.url,
            max_in_flight=MAX_BATCHES,
            max_messages=MAX_ENTRIES,
            max_bytes=MAX_BATCH_BYTES,
            timeout=settings.timeout,
        )
        self._clients = contextlib.AsyncExitStack()
        self._client: Any = None
        self._opening = asyncio.Lock()
        self._message_limit = MAX_MESSAGE_BYTES

    async def check(self) -> None:
        """Request the queue's attributes, and warn if it takes only small messages."""
        if self._batches.closed:
            raise closed_failure()
        try:
            async with asyncio.timeout(self._batches.timeout):
                client = await self._open()
                answer = await client.get_queue_attributes(
                    QueueUrl=self._queue.url, AttributeNames=["MaximumMessageSize"]
                )
        except (TimeoutError, BotoCoreError, ClientError) as error:
            raise self._failure_from(error) from error
        self._message_limit = int(answer.get("Attributes", {}).get("MaximumMessageSize", MAX_MESSAGE_BYTES))
        if self._message_limit < MAX_BATCH_BYTES:
            self._warn_of_losses(
                f"messages larger than {self._message_limit} bytes are rejected: raise MaximumMessageSize"
            )

    async def publish(self, event: CloudEvent) -> None:
        """Send the event and return when the service has confirmed it."""
        message = _encode(event, is_fifo=self._queue.is_fifo)
        await self._batches.publish(message, message.size)

    async def close(self) -> None:
        """Send the events that wait, which the timeout bounds, and close the connections."""
        await self._batches.close()
        await self._clients.aclose()

    async def _open(self) -> Any:
        """Return the client, once there are credentials for it. Raises the library's errors."""
        async with self._opening:
            if self._client is None:
                session = get_session()
                # A client that is made without credentials never reads them later.
                if await session.get_credentials() is None:
                    raise NoCredentialsError
                self._client = await self._clients.enter_async_context(
                    session.create_client(
                        "sqs",
                        region_name=self._queue.region,
                        endpoint_url=self._queue.endpoint,
                        **self._options,
                    )
                )
            return self._client

    async def _send(self, batch: Sequence[_Message]) -> list[Failure | None]:
        """Send a batch and return a failure or None for each message."""
        try:
            client = await self._open()
            answer = await client.send_message_batch(
                QueueUrl=self._queue.url,
                Entries=[{"Id": str(number), **message.fields} for number, message in enumerate(batch)],
            )
        except ClientError as error:
            if _code(error) not in _ABOUT_A_MESSAGE:
                return [self._failure_from(error)] * len(batch)
            if len(batch) == 1:
                return [self._rejection(_code(error), "", batch[0])]
            # One message has failed the batch, and the service does not say which.
            alone = await asyncio.gather(*(self._send([message]) for message in batch))
            return [outcome for [outcome] in alone]
        except BotoCoreError as error:
            return [self._failure_from(error)] * len(batch)
        return self._read_answer(answer, batch)

    def _read_answer(self, answer: Mapping[str, Any], batch: Sequence[_Message]) -> list[Failure | None]:
        outcomes: dict[str, Failure | None] = {each["Id"]: None for each in answer.get("Successful", ())}
        for each in answer.get("Failed", ()):
            message = batch[int(each["Id"])]
            outcomes[each["Id"]] = self._rejection(each.get("Code", ""), each.get("Message", ""), message)
        # The service may leave a message out of its answer: count that as a failure, not as a success.
        unconfirmed = PublishFailed(f"{self._queue.url}: not confirmed", reason="unconfirmed")
        return [outcomes.get(str(number), unconfirmed) for number in range(len(batch))]

    def _failure_from(self, error: TimeoutError | BotoCoreError | ClientError) -> PublishFailed:
        url = self._queue.url
        if isinstance(error, ClientError):
            # Its text may quote the signed headers, with the session token.
            reason, advice = _ADVICE.get(_code(error), ("refused", "the service rejects the request"))
            return PublishFailed(f"{url}: {quoted(_code(error), 64)}: {advice}", reason=reason)
        if isinstance(error, TimeoutError):
            return timeout_failure(url, self._batches.timeout)
        if isinstance(error, _NO_CREDENTIALS):
            reason, advice = _AUTH
            return PublishFailed(f"{url}: {type(error).__name__}: {advice}", reason=reason)
        is_late = isinstance(error, ConnectTimeoutError | ReadTimeoutError)
        return PublishFailed(f"{url}: {cause(error)}", reason="timeout" if is_late else "connection")

    def _rejection(self, code: str, text: str, message: _Message) -> Failure:
        """Return the failure of one rejected message."""
        url = self._queue.url
        if code == "InvalidMessageContents":
            return PublishRejected(f"{url} rejects the characters of the text", reason="content")
        if code in _ABOUT_A_MESSAGE and (code == "BatchRequestTooLong" or message.size > self._message_limit):
            return PublishRejected(f"{url} takes no message of {message.size} bytes", reason="too_large")
        reason, advice = _ADVICE.get(code, ("refused", quoted(text)))
        return PublishFailed(f"{url}: {quoted(code, 64)}: {advice}", reason=reason)


def _encode(event: CloudEvent, *, is_fifo: bool) -> _Message:
    body = encode(event).decode("ascii")
    delivery_id = str(event.get_extension("deliveryid") or event.get_id())
    ids = {"id": str(event.get_id()), "deliveryid": delivery_id}
    fields: dict[str, Any] = {
        "MessageBody": body,
        "MessageAttributes": {
            name: {"DataType": "String", "StringValue": value} for name, value in ids.items()
        },
    }
    if is_fifo:
        fields["MessageGroupId"] = _fifo_id(event.get_subject() or delivery_id)
        fields["MessageDeduplicationId"] = _fifo_id(delivery_id)
    size = len(body) + sum(
        len(name) + len("String") + len(value.encode("utf-8", "surrogatepass")) for name, value in ids.items()
    )
    if size > MAX_MESSAGE_BYTES:
        raise PublishRejected(
            f"SQS takes messages of at most {MAX_MESSAGE_BYTES} bytes, not of {size}", reason="too_large"
        )
    return _Message(fields=fields, size=size)


def _code(error: ClientError) -> str:
    """Return the error's name, without the namespace of older protocols."""
    code: str = error.response.get("Error", {}).get("Code", "")
    return code.rpartition(".")[2]


def _fifo_id(text: str) -> str:
    """Return the text if SQS takes it as a group or an id, or else its digest."""
    if _FIFO_ID.fullmatch(text):
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _parse(settings: DestinationSettings) -> _Queue:
    with usable_url(
        settings,
        "sqs://sqs.<region>.amazonaws.com/<account>/<queue>, ?endpoint=https://host&region=name as needed; "
        "credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ) as text:
        url = split_url(text, port=443, options={"endpoint", "region"})
        [(host, port)] = url.hosts
        endpoint = url.options.get("endpoint", f"https://{host}:{port}".removesuffix(":443"))
        region = url.options.get("region", _region_of(host) or aws_region(os.environ))
        path = _AMAZON_PATH if _AMAZON.fullmatch(host) else _PATH
        if not _is_endpoint(endpoint) or not _REGION_NAME.fullmatch(region):
            raise ValueError("no endpoint or no region")
        if url.user is not None or not path.fullmatch(url.path):
            raise ValueError("a login, or no account and queue")
    if "endpoint" not in url.options:
        endpoint = _configured_endpoint(settings) or endpoint
    endpoint = endpoint.removesuffix("/")
    return _Queue(url=endpoint + url.path, endpoint=endpoint, region=region)


def _region_of(host: str) -> str:
    found = _REGION.fullmatch(host)
    return (found["new"] or found["old"]) if found else ""


def _configured_endpoint(settings: DestinationSettings) -> str | None:
    """Return the endpoint that the environment names, if any. Raises SettingsError if it is not a URL."""
    endpoint = aws_endpoint(os.environ, "SQS")
    if endpoint and not _is_endpoint(endpoint):
        raise SettingsError(
            f"destination {settings.name!r}: AWS_ENDPOINT_URL_SQS or AWS_ENDPOINT_URL: write "
            "https://host, or http://host:port for a server of your own; no user, password or query"
        )
    return endpoint


def _client_options(settings: DestinationSettings) -> dict[str, Any]:
    """Return the client's options. Raises SettingsError for TLS files that cannot be used."""
    config: dict[str, Any] = {
        "connect_timeout": step_timeout(CONNECT_SECONDS, settings.timeout),
        "read_timeout": step_timeout(READ_SECONDS, settings.timeout),
        "retries": {"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
    }
    verify: str | None = None
    if (files := settings.tls) is not None:
        # The client takes paths, not a context. Open them now, so that an unusable file is an error at start.
        open_tls(settings)
        verify = files.ca
        if files.certificate is not None:
            config["client_cert"] = (files.certificate, files.key or files.certificate)
    return {"config": AioConfig(**config), "verify": verify}


def _is_endpoint(text: str) -> bool:
    try:
        url = split_url(text, port=443)
    except ValueError:
        return False
    is_plain = url.user is None and _ENDPOINT_PATH.fullmatch(url.path) is not None
    return url.scheme in {"https", "http"} and is_plain
