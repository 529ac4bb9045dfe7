"""Query parameters and bodies of the internal API: their types, each with the error for a wrong value."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Self, get_args
from uuid import UUID

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from receiver.clipia.job_request import MAX_METADATA
from receiver.core.request_values import first_problem, read_cursor, read_id_cursor, read_moment
from receiver.errors import RequestError

MAX_PAGE_ROWS: Final = 200
MAX_WAIT_SECONDS: Final = 300.0
"""How long a long poll may last."""

_UNKNOWN: Final = "unknown parameter; remove it or check its spelling"
_METADATA: Final = "metadata."


class Parameters(BaseModel):
    """Query parameters or a body. The validators below raise RequestError, which pydantic passes on."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    @classmethod
    def read(cls, values: object) -> Self:
        """Validate values. Raises RequestError, which names the wrong parameter."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            path, message = first_problem(error)
            unknown = error.errors()[0]["type"] == "extra_forbidden"
            raise invalid(f"{path[0]}: {_UNKNOWN if unknown else message}") from None


def invalid(message: str) -> RequestError:
    """Return the error for bad input."""
    return RequestError(message, code="invalid_request")


def one_of(choices: Any) -> BeforeValidator:
    """Return the check that a value is one of a Literal's, or is left out."""
    names = get_args(choices)

    def check(value: object, info: ValidationInfo) -> object:
        if value is not None and value not in names:
            raise invalid(f"{info.field_name}: write one of {', '.join(names)}")
        return value

    return BeforeValidator(check)


def _read_limit(value: object, info: ValidationInfo) -> int:
    text = str(value)
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= MAX_PAGE_ROWS):
        raise invalid(f"{info.field_name}: write a number from 1 to {MAX_PAGE_ROWS}")
    return int(text)


def _read_moment(value: object, info: ValidationInfo) -> datetime:
    try:
        return read_moment(value, now=datetime.now(UTC))
    except ValueError as error:
        raise invalid(f"{info.field_name}: {error}") from None


def _read_seconds(value: object, info: ValidationInfo) -> float:
    try:
        seconds = float(value) if isinstance(value, str | int | float) else -1.0
    except (ValueError, OverflowError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise invalid(f"{info.field_name}: write seconds from 0 to {MAX_WAIT_SECONDS:.0f}")
    return seconds


def _read_flag(value: object, info: ValidationInfo) -> bool:
    if not isinstance(value, bool):
        raise invalid(f"{info.field_name}: write true or false")
    return value


def _read_query_flag(value: object, info: ValidationInfo) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise invalid(f"{info.field_name}: write true or false")
    return str(value).lower() == "true"


def _read_name(value: object, info: ValidationInfo) -> str:
    if not isinstance(value, str) or "\x00" in value:
        raise invalid(f"{info.field_name}: write a name")
    return value


def _read_ids(value: object, info: ValidationInfo) -> list[UUID]:
    if not isinstance(value, list):
        raise invalid(f"{info.field_name}: write a list")
    return [_read_id(each, info) for each in value]


def _read_id(text: object, info: ValidationInfo) -> UUID:
    try:
        return UUID(str(text))
    except ValueError:
        raise invalid(f"{info.field_name}: {str(text)[:64]!r} is not an id") from None


# Bounds after a validator would be missing in the specification.
Limit = Annotated[int, Field(ge=1, le=MAX_PAGE_ROWS), BeforeValidator(_read_limit)]
Cursor = Annotated[
    int | None,
    BeforeValidator(read_cursor),
    WithJsonSchema({"type": "string", "pattern": "^[0-9]{1,18}$"}),
]
IdCursor = Annotated[
    UUID | None, BeforeValidator(read_id_cursor), WithJsonSchema({"type": "string", "format": "uuid"})
]
Moment = Annotated[
    datetime,
    BeforeValidator(_read_moment),
    WithJsonSchema(
        {
            "type": "string",
            "anyOf": [{"format": "date-time"}, {"format": "date"}, {"pattern": "^[0-9]{1,5}[smhdw]$"}],
            "examples": ["2026-01-31T12:00:00Z", "90m"],
        }
    ),
]
"""A time, in UTC if it has no zone; or an age, such as 30s, 90m, 2h, 7d or 1w."""
Seconds = Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS), BeforeValidator(_read_seconds)]
Flag = Annotated[bool, BeforeValidator(_read_flag)]
QueryFlag = Annotated[bool, BeforeValidator(_read_query_flag)]
Name = Annotated[str, BeforeValidator(_read_name)]
Id = Annotated[UUID, BeforeValidator(_read_id)]
Ids = Annotated[list[UUID], BeforeValidator(_read_ids)]


class MetadataFilter(Parameters):
    """Filters by the metadata of jobs."""

    metadata: Annotated[
        dict[str, str],
        WithJsonSchema(
            {
                "type": "object",
                "patternProperties": {"^metadata\\.": {"type": "string"}},
                "additionalProperties": False,
                "maxProperties": MAX_METADATA,
                "examples": [{"metadata.order": "4711"}],
            }
        ),
    ] = {}
    """The parameters `metadata.NAME`: exact values of a job's metadata."""

    @model_validator(mode="before")
    @classmethod
    def _gather_metadata(cls, values: dict[str, str]) -> dict[str, Any]:
        if "metadata" in values:
            raise invalid(f"metadata: {_UNKNOWN}")
        found = {name: value for name, value in values.items() if name.startswith(_METADATA)}
        if len(found) > MAX_METADATA:
            raise invalid(f"metadata: filter by {MAX_METADATA} names at most")
        rest = {name: value for name, value in values.items() if name not in found}
        return rest | {"metadata": {name.removeprefix(_METADATA): value for name, value in found.items()}}
