"""Verified bytes into a `Generation` and its media references; pure.

A valid signature does not make a body safe to store: JSON as Python reads it can still hold what a database
refuses (NUL, lone surrogates, numbers without bounds) or what two readers take differently (duplicate keys,
a BOM). Such bodies are `UnrecognizedBody` here, once and for all, so that nothing behind has to ask.

Past that the reading is lenient. Unknown fields are kept, and a payload of an unexpected shape gives an event
with whatever could be read from it: the raw bytes are stored anyway, and refusing would lose the event.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeGuard

import orjson

from receiver.errors import UnrecognizedBody

Kind = Literal["image", "video", "audio"]
Variant = Literal["original", "display"]

REASONS: Final = (
    "not_utf8",
    "not_json",
    "too_deep",
    "number",
    "duplicate_key",
    "text",
    "not_object",
    "request_id",
    "status",
)
"""Every `UnrecognizedBody.reason`.

`number` is one that is infinite, NaN or out of range; `text` is a string with a NUL or a lone surrogate.
"""

CANCELED: Final = "CANCELED"
MAX_DEPTH: Final = 32
MAX_INTEGER: Final = 2**63
MAX_FILES: Final = 64
MAX_URL_LENGTH: Final = 2048
MAX_MODEL_LENGTH: Final = 255

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
_MAX_INTEGER_LENGTH = len(str(-MAX_INTEGER))
_FILES: Final[tuple[tuple[str, Kind], ...]] = (
    ("images", "image"),
    ("video", "video"),
    ("audio", "audio"),
    ("audios", "audio"),
)


@dataclass(frozen=True, kw_only=True)
class MediaRef:
    """One file to fetch; (`position`, `variant`) is unique within its event and the same at every parse."""

    position: int  # counts the listed images, videos and audios from 0; the two variants of one share it
    kind: Kind
    variant: Variant
    url: str
    field: str  # where in `output` the URL stands, such as "images[0].original_url"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generation result, as far as it could be read."""

    request_id: str
    status: Literal["OK", "ERROR"]
    model: str | None
    cost: int | None  # credits
    output: Any  # as parsed, unknown fields included; None where absent
    error: Any  # likewise
    media: tuple[MediaRef, ...]  # each distinct URL once; empty for ERROR
    media_left_out: int  # URLs beyond `MAX_FILES`, and entries that are no usable file

    @property
    def canceled(self) -> bool:
        """Whether it was canceled, as `result_body` says it."""
        return isinstance(self.error, dict) and self.error.get("code") == CANCELED


class Summary(NamedTuple):
    """What is stored of a generation beside its raw body."""

    request_id: str
    status: Literal["OK", "ERROR"]
    model: str | None
    cost: int | None  # credits


def summarize(raw: bytes) -> Summary:
    """Read of the body of a webhook what ingest stores; raises as `parse` does, for the same bodies."""
    return _summarize(_load(raw))


def parse(raw: bytes) -> Generation:
    """Read the body of a webhook. Raises `UnrecognizedBody` with one of `REASONS`, and nothing else."""
    body = _load(raw)
    summary = _summarize(body)
    output = _object(body.get("payload")).get("output")
    media, left_out = _list_media(_object(output)) if summary.status == "OK" else ((), 0)
    return Generation(
        **summary._asdict(), output=output, error=body.get("error"), media=media, media_left_out=left_out
    )


class Content(NamedTuple):
    """What is forwarded of a generation, beside its files."""

    model: str | None
    cost: int | None  # credits
    output: Any
    error: Any


def reread(raw: bytes) -> Content:
    """Read the body of a stored event again.

    `parse` has taken it once, so no rule has to be looked at twice: what is left is a third of the cost.
    """
    body = orjson.loads(raw)
    payload = _object(body.get("payload"))
    return Content(
        _model(payload.get("model")), _cost(payload.get("cost")), payload.get("output"), body.get("error")
    )


def _summarize(body: Any) -> Summary:
    if not isinstance(body, dict):
        raise UnrecognizedBody("not_object")
    request_id = body.get("request_id")
    if not is_request_id(request_id):
        raise UnrecognizedBody("request_id")
    status = body.get("status")
    if status not in ("OK", "ERROR"):
        raise UnrecognizedBody("status")
    payload = _object(body.get("payload"))
    return Summary(request_id, status, _model(payload.get("model")), _cost(payload.get("cost")))


def result_body(
    request_id: str, status: Literal["COMPLETED", "FAILED", "CANCELED"], result: Mapping[str, Any]
) -> bytes:
    """Return a polled result as the body of the webhook that did not come.

    `result` is the JSON of `GET /v1/requests/{id}`. A cancellation, of which Clipia's webhooks know nothing,
    is an ERROR with the code `CANCELED`.
    """
    if status == "COMPLETED":
        payload = {name: result.get(name) for name in ("model", "output", "cost")}
        return _encode({"request_id": request_id, "status": "OK", "payload": payload})
    if status == "CANCELED":
        error = {"code": CANCELED, "message": "The generation was canceled."}
    else:
        error = result.get("error") or {"code": "GENERATION_FAILED", "message": "The generation failed."}
    return _encode({"request_id": request_id, "status": "ERROR", "error": error})


def is_request_id(value: object) -> TypeGuard[str]:
    """Tell whether this is an id that Clipia may have given: a short word of plain characters."""
    return isinstance(value, str) and _REQUEST_ID.fullmatch(value) is not None


def same_json(a: bytes, b: bytes) -> bool:
    """Tell whether two bodies are equal as JSON values: 1 equals 1.0 but not true; order of keys is nothing.

    What `parse` would not take as JSON is equal only to the same bytes.
    """
    if a == b:
        return True
    try:
        return _equal(_load(a), _load(b))
    except UnrecognizedBody:
        return False


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _load(raw: bytes) -> Any:
    """Decode strictly: whoever gets the result can store it and encode it again."""
    value = _load_plain(raw)
    return _load_strictly(raw) if value is _NOT_PLAIN else value


def _load_strictly(raw: bytes) -> Any:
    try:
        # json.loads would guess the encoding of bytes, and take UTF-16 and UTF-32 too.
        text = raw.decode("utf-8")
        value = _DECODER.decode(text)
    except UnicodeDecodeError:
        raise UnrecognizedBody("not_utf8") from None
    except RecursionError:
        raise UnrecognizedBody("too_deep") from None
    except ValueError:
        raise UnrecognizedBody("not_json") from None
    # The walk costs as much as decoding. What it looks for cannot be there without showing here.
    if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:
        _inspect(value)
    return value


_NOT_PLAIN: Final = object()


def _load_plain(raw: bytes) -> Any:
    """Decode what is written as most encoders write it, at a third of the cost; else return `_NOT_PLAIN`.

    Whatever comes out of orjson as the same bytes had nothing in it that `_load_strictly` would refuse or
    read otherwise: no key twice, no number that is rounded, no text that is repaired.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH or b"\\u" in raw:
        return _NOT_PLAIN
    try:
        value = orjson.loads(raw)
        # Integers beyond 53 bits are an error here: they may be beyond 64 bits, too.
        same = orjson.dumps(value, option=orjson.OPT_STRICT_INTEGER) == raw
    except (ValueError, TypeError):  # TypeError is what orjson calls its refusal to encode
        return _NOT_PLAIN
    return value if same else _NOT_PLAIN


def _inspect(value: Any, enclosing: int = 0) -> None:
    """Refuse nesting beyond `MAX_DEPTH` and text that no database takes, in keys too."""
    if isinstance(value, str):
        if _UNSTORABLE.search(value):
            raise UnrecognizedBody("text")
        return
    if not isinstance(value, dict | list):
        return
    if enclosing == MAX_DEPTH:
        raise UnrecognizedBody("too_deep")
    for child in value:
        _inspect(child, enclosing + 1)
    if isinstance(value, dict):
        for child in value.values():
            _inspect(child, enclosing + 1)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise UnrecognizedBody("duplicate_key")
    return result


def _integer(text: str) -> int:
    # The length first: int() of thousands of digits raises a ValueError, which would pass for `not_json`.
    if len(text) > _MAX_INTEGER_LENGTH or abs(number := int(text)) > MAX_INTEGER:
        raise UnrecognizedBody("number")
    return number


def _real(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise UnrecognizedBody("number")
    return number


def _refuse_constant(_name: str) -> NoReturn:
    raise UnrecognizedBody("number")


# Not orjson: it keeps the last of duplicate keys and makes a float of 2**65.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates,
    parse_int=_integer,
    parse_float=_real,
    parse_constant=_refuse_constant,
)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _model(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MAX_MODEL_LENGTH else None


def _cost(value: Any) -> int | None:
    # It goes into a signed 64-bit column, which ends one before MAX_INTEGER. And a bool is an int to Python.
    return value if type(value) is int and value < MAX_INTEGER else None


def _list_media(output: dict[str, Any]) -> tuple[tuple[MediaRef, ...], int]:
    """Collect the distinct URLs of an output; the number is of those that had to be left out."""
    media: list[MediaRef] = []
    seen: set[str] = set()
    left_out = 0
    for kind, path, entry in _entries(output):
        if not isinstance(entry, dict):
            left_out += 1
            continue
        position = media[-1].position + 1 if media else 0
        variant: Variant = "original"
        for name in ("original_url", "url"):
            url = entry.get(name)
            if url is None:
                continue
            if not isinstance(url, str) or not 0 < len(url) <= MAX_URL_LENGTH:
                left_out += 1
                continue
            if url not in seen:
                seen.add(url)
                if len(media) < MAX_FILES:
                    field = f"{path}.{name}"
                    media.append(
                        MediaRef(position=position, kind=kind, variant=variant, url=url, field=field)
                    )
                else:
                    left_out += 1
            # Only beside an original is `url` a rendering for display; alone it is the best file there is.
            variant = "display"
    return tuple(media), left_out


def _entries(output: dict[str, Any]) -> Iterator[tuple[Kind, str, Any]]:
    """Yield whatever stands for a file, with its path, in the same order for every order of keys.

    A list where one object is documented, or the reverse, is read as what it is.
    """
    for key, kind in _FILES:
        value = output.get(key)
        if isinstance(value, list):
            for index, entry in enumerate(value):
                if entry is not None:
                    yield kind, f"{key}[{index}]", entry
        elif value is not None:
            yield kind, key, value
