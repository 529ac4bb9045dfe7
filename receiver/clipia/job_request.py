"""A caller's job, validated and frozen into the bytes for Clipia; pure except for random ids."""

import hashlib
import secrets
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Self

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from receiver.core.request_values import check_key, invalid_request
from receiver.core.trace_context import TraceContext
from receiver.db.rows import NewJob, digest_token, new_id
from receiver.errors import RequestError, RequestTooLarge
from receiver.price import MAX_CREDITS, Credits, read_credits
from receiver.settings import CALLBACK_PATH, DEFAULT_SOURCE

MAX_REQUEST_BYTES = 1024 * 1024
"""A longer request to Clipia is rejected before it is sent."""

MAX_METADATA = 32

# Databases cannot store NUL. Lone surrogates are already rejected by pydantic.
_LINE = r"^[^\x00-\x1f\x7f]+$"
_TEXT = r"^[^\x00]*$"


class JobRequest(BaseModel):
    """A job as its caller submits it."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True
    )

    # It becomes a segment of a path; dots at its start could lead to another path.
    model: Annotated[
        str, Field(min_length=1, max_length=255, pattern=r"^[^.\x00-\x1f\x7f][^\x00-\x1f\x7f]*$")
    ]
    """The slug of a model."""
    input: dict[str, Any]
    """The model's parameters."""
    metadata: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=64, pattern=_LINE)],
            Annotated[str, Field(max_length=512, pattern=_TEXT)],
        ],
        Field(max_length=MAX_METADATA),
    ] = {}
    """Texts of the caller, returned with the job and in the message."""
    max_cost: Annotated[Credits, Field(ge=0, le=MAX_CREDITS), AfterValidator(read_credits)] | None = None
    """The maximum price in credits."""
    strict: bool | None = None
    """Whether unknown keys of the input are invalid; None: the setting decides."""

    @classmethod
    def read(cls, values: object) -> Self:
        """Validate a job. Raises RequestError, which names the invalid field."""
        try:
            request = cls.model_validate(values)
        except ValidationError as error:
            raise invalid_request(error) from None
        encode([[[[request.input]]]])  # messages nest it four levels deeper, and the depth is limited
        return request

    def freeze(
        self,
        *,
        caller: str,
        key: str | None,
        public_url: str | None,
        account: str,
        cost: Credits | None = None,
        warnings: list[dict[str, Any]] | None = None,
        trace: TraceContext | None = None,
    ) -> NewJob:
        """Make the row of a new job. All attempts will send the same bytes.

        Raises RequestError if the input cannot be sent.
        """
        job_id, token = new_id(), new_token()
        return NewJob(
            id=job_id,
            caller=caller,
            idempotency_key=check_key(key) if key is not None else str(job_id),
            fingerprint=self.fingerprint(),
            source=DEFAULT_SOURCE,
            model=self.model,
            request=encode_request(self.input, job_id, token, public_url),
            has_webhook=public_url is not None,
            provider_key=uuid.uuid4(),
            metadata=dict(self.metadata),
            max_cost=self.max_cost,
            cost=cost,
            account=account,
            path_token=digest_token(token),
            warnings=warnings or [],
            traceparent=trace and trace.parent,
            tracestate=trace and trace.state,
        )

    def fingerprint(self) -> str:
        """Return a hash of the job, which must be the same if an idempotency key is used again."""
        known = JobRequest.model_fields.keys() - {"strict"}
        content = self.model_dump(exclude_defaults=True, include=known)
        return hashlib.sha256(encode(content)).hexdigest()


def new_token() -> str:
    """Return a random token (192 bits) for the path of the callback."""
    return secrets.token_urlsafe(24)


def encode_request(given: Mapping[str, Any], job_id: uuid.UUID, token: str, public_url: str | None) -> bytes:
    """Return the bytes for Clipia. Raises RequestError if the input is not JSON or too long."""
    content: dict[str, Any] = {"input": given}
    if public_url is not None:
        # The path has the job's id, because the webhook may arrive before the answer to the submission. The
        # path is not signed and the id is not secret, so the token proves that the request is from Clipia.
        # Both are in one segment, which older releases take for an unknown job. They would reject a path with
        # two segments.
        content["webhook_url"] = f"{public_url}{CALLBACK_PATH}/{DEFAULT_SOURCE}/{job_id}.{token}"
    request = encode(content)
    if len(request) > MAX_REQUEST_BYTES:
        message = f"input: {len(request)} bytes are more than the limit of {MAX_REQUEST_BYTES}"
        raise RequestTooLarge(f"{message} (pass files by URL)", code="invalid_request")
    return request


def refreeze(request: bytes, job_id: uuid.UUID, public_url: str | None) -> tuple[bytes, str]:
    """Return the bytes for submitting a job again, and the digest of their token.

    The request has a new key, the current address of the callback and a new token, so that the webhook of the
    old request cannot end the job. Raises RequestError as `encode_request` does, and if the input was
    deleted.
    """
    given = read_input(request)
    if given is None:
        message = "the job cannot be submitted again, because its input was deleted"
        raise RequestError(message, code="not_resubmittable")
    token = new_token()
    return encode_request(given, job_id, token, public_url), digest_token(token)


def read_input(request: bytes) -> dict[str, Any] | None:
    """Return the input of a frozen request; None if it was deleted (`NO_INPUT`)."""
    found: dict[str, Any] | None = orjson.loads(request)["input"]
    return found


def join_warnings(ours: list[dict[str, Any]], clipias: list[Any]) -> list[Any]:
    """Return all warnings about an input. If both have one for a parameter, Clipia's is used."""
    known = [each.get("parameter") for each in clipias if isinstance(each, dict)]
    return [*(each for each in ours if each["parameter"] not in known), *clipias]


def encode(value: Any) -> bytes:
    """Return canonical JSON. Raises RequestError if a value is not JSON or nested too deeply."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONEncodeError, RecursionError):
        raise RequestError(
            "input: not JSON; write objects, lists, text, numbers of up to 64 bits, true, false and null",
            code="invalid_request",
        ) from None
