"""What a caller asks for: checked, and frozen into the bytes that go to Clipia. Pure but for random ids."""

import hashlib
import secrets
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from receiver.core.request_checks import check_key, invalid_request
from receiver.db.rows import NewJob, digest_token, new_id
from receiver.errors import RequestError, RequestTooLarge
from receiver.price import MAX_CREDITS, Credits, read_credits
from receiver.settings import CALLBACK_PATH, DEFAULT_SOURCE

MAX_REQUEST_BYTES = 1024 * 1024
"""Bytes of a request to Clipia."""

MAX_METADATA = 32

# What no database stores: NUL. Lone surrogates are no strings to pydantic anyway.
_LINE = r"^[^\x00-\x1f\x7f]+$"
_TEXT = r"^[^\x00]*$"


class JobRequest(BaseModel):
    """A job as its caller asks for it."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)

    # It becomes a part of a path, where dots at its start would lead elsewhere.
    model: Annotated[
        str, Field(min_length=1, max_length=255, pattern=r"^[^.\x00-\x1f\x7f][^\x00-\x1f\x7f]*$")
    ]
    """The slug of one of Clipia's models."""
    input: dict[str, Any]
    """The model's parameters."""
    metadata: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=64, pattern=_LINE)],
            Annotated[str, Field(max_length=512, pattern=_TEXT)],
        ],
        Field(max_length=MAX_METADATA),
    ] = {}
    """The caller's own words, returned with the job and with the forwarded message."""
    max_cost: Annotated[Credits, Field(ge=0, le=MAX_CREDITS), AfterValidator(read_credits)] | None = None
    """Credits that the job may cost at most."""
    strict: bool | None = None
    """Whether keys are refused that the model's schema does not have; None is as the settings say."""

    @classmethod
    def read(cls, values: object) -> "JobRequest":
        """Raise RequestError, which says what is wrong, for anything that is not a job."""
        try:
            request = cls.model_validate(values)
        except ValidationError as error:
            raise invalid_request(error) from None
        encode([[[[request.input]]]])  # it has to fit into lists and messages, whose depth is bounded
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
    ) -> NewJob:
        """Make the row of a new job, with the request as it will be sent on every try.

        Raises RequestError where the input cannot be sent.
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
        )

    def fingerprint(self) -> str:
        """Return what must be the same where a key is used again: all that the job is, whatever its order."""
        content = self.model_dump(exclude_defaults=True, exclude={"strict"})
        return hashlib.sha256(encode(content)).hexdigest()


def new_token() -> str:
    """Return an unguessable token (192 bits) for a callback's path."""
    return secrets.token_urlsafe(24)


def encode_request(given: Mapping[str, Any], job_id: uuid.UUID, token: str, public_url: str | None) -> bytes:
    """Return the bytes that are sent to Clipia. Raises RequestError where there are none or too many."""
    content: dict[str, Any] = {"input": given}
    if public_url is not None:
        # The path names the job, so that its event finds it even before the answer to the submission. The
        # path is not signed, so the token proves that it is Clipia who uses it: the job's id is no secret.
        # Both are one segment, which the release before takes for an unknown job and not for a wrong path.
        content["webhook_url"] = f"{public_url}{CALLBACK_PATH}/{DEFAULT_SOURCE}/{job_id}.{token}"
    request = encode(content)
    if len(request) > MAX_REQUEST_BYTES:
        raise RequestTooLarge(
            f"input: takes {len(request)} bytes; {MAX_REQUEST_BYTES} are the limit (pass files by URL)",
            code="invalid_request",
        )
    return request


def refreeze(request: bytes, job_id: uuid.UUID, public_url: str | None) -> tuple[bytes, str]:
    """Return the bytes with which a job is submitted anew, and the digest of their token.

    A new key is a new request: it goes to where the callback is now, and with a new token the webhook of the
    old request does not end the job. Raises RequestError as `encode_request` does, and for a deleted input.
    """
    given = read_input(request)
    if given is None:
        raise RequestError(
            "the job's input was deleted, so the job cannot be submitted again",
            code="not_resubmittable",
        )
    token = new_token()
    return encode_request(given, job_id, token, public_url), digest_token(token)


def read_input(request: bytes) -> dict[str, Any] | None:
    """Return the input in the bytes that are sent to Clipia; None if it was deleted (`NO_INPUT`)."""
    found: dict[str, Any] | None = orjson.loads(request)["input"]
    return found


def join_warnings(ours: list[dict[str, Any]], clipias: list[Any]) -> list[Any]:
    """Return the warnings about an input; Clipia's words about a parameter stand in place of ours."""
    told = [each.get("parameter") for each in clipias if isinstance(each, dict)]
    return [*(each for each in ours if each["parameter"] not in told), *clipias]


def encode(value: Any) -> bytes:
    """Return JSON, the same for the same content. Raises RequestError for other values and deep nesting."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONEncodeError, RecursionError):
        raise RequestError(
            "input: is not JSON: write objects, lists, text, numbers to 64 bits, true, false and null",
            code="invalid_request",
        ) from None
