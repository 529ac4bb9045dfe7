"""Templates and files of the dashboard. Jinja2 escapes each value; no template marks one as safe."""

import base64
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

import orjson
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from receiver import __version__
from receiver.api.auth import Caller
from receiver.dashboard.links import page_of
from receiver.media.file_types import KNOWN_TYPES
from receiver.status import age, state_of

_FOLDER: Final = Path(__file__).parent
_STATIC: Final = _FOLDER / "static"
_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
SAFE_HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
NOTICES: Final = {
    "logged_out": "You are logged out.",
    "delivery_retried": "The delivery is due now.",
    "delivery_discarded": "The delivery was discarded.",
    "files_given_up": "Downloads given up: {number}. Their messages are sent without these files.",
    "event_erased": "The event was erased.",
    "job_resubmitted": "The job is submitted again.",
    "job_canceled": "The job was canceled.",
    "job_unsure": "The job is unsure now: Clipia may have it.",
    "promoted": "The other body is the event's now. Destinations that get it: {number}.",
    "result_stored": "Clipia's result is stored.",
    "result_known": "The result was stored already.",
    "recovered": "Unrecognized events that were read: {number}.",
    "paused": "It is paused: events wait.",
    "frozen": "Submissions are frozen.",
    "thawed": "Jobs are submitted again. Jobs that may have been sent and are unsure now: {count}.",
    "replay_canceled": "The replay was canceled.",
    "resumed": "Deliveries go on.",
    "retried": "{count} dead letters will be delivered again.",
}
"""The sentences after actions. A page shows a known one alone: its address may come from anywhere."""
_MAX_NUMBER_LENGTH: Final = 12
MAX_TEXT: Final = 64 * 1024
"""The most characters of a body that a page shows."""


def render(
    request: Request,
    template: str,
    values: Mapping[str, Any],
    *,
    status: int = 200,
    caller: Caller | None = None,
) -> Response:
    """Return a page. `caller` is the one whose session it is shown in."""
    context = {
        "caller": caller,
        "notice": _notice(request),
        "path": request.url.path,
        "now": datetime.now(UTC),
        "version": __version__,
        "address": request.url.path + (f"?{request.url.query}" if request.url.query else ""),
        "query": request.query_params,
        **values,
    }
    html = _environment().get_template(template).render(context)
    return HTMLResponse(html, status, SAFE_HEADERS)


def _notice(request: Request) -> str | None:
    query = request.query_params
    text = NOTICES.get(query.get("done", ""))
    numbers = {name: value for name, value in query.items() if _is_number(value)}
    try:
        return None if text is None else text.format_map(numbers)
    except KeyError:
        return None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MAX_NUMBER_LENGTH


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "age": age,
        "since": _since,
        "moment": _moment,
        "size": _size,
        "pretty": _pretty,
        "cut": _cut,
        "error_text": _error_text,
        "text_of_base64": _text_of_base64,
        "preview_of": _preview_of,
        "page_of": page_of,
        "state_of": state_of,
    }
    environment.globals["static"] = _static_path
    return environment


def _moment(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _since(time: datetime, now: datetime) -> str:
    """Return how long ago a time was."""
    return age(max(0.0, (now - time).total_seconds()))


def _size(number: int) -> str:
    """Return bytes in their largest unit."""
    amount, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _pretty(value: object) -> str:
    """Return JSON with indents."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str).decode()


def _cut(text: str) -> str:
    """Return the start of a long text."""
    rest = len(text) - MAX_TEXT
    return text if rest <= 0 else f"{text[:MAX_TEXT]}\n… {rest} more characters: the API has them"


def _error_text(error: str | Mapping[str, Any] | None) -> str | None:
    """Return an error as a text; the ones of jobs have a code and a message."""
    if isinstance(error, Mapping):
        return ": ".join(str(error[name]) for name in ("code", "message") if error.get(name))
    return error


def _text_of_base64(text: str) -> str:
    return base64.b64decode(text).decode(errors="replace")


def _preview_of(content_type: str | None) -> str | None:
    """Return the element that shows a file: `image`, `video` or `audio`; None if a browser might run it."""
    return content_type.partition("/")[0] if content_type in KNOWN_TYPES else None


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Return the files with their digests, by name."""
    contents = {each.name: each.read_bytes() for each in _STATIC.iterdir() if each.suffix in _TYPES}
    return {name: (content, hashlib.sha256(content).hexdigest()) for name, content in contents.items()}


def _static_path(name: str) -> str:
    """Return the address of a file; another content has another address."""
    return f"/dashboard/static/{name}?v={_files()[name][1][:16]}"


async def send_static(request: Request) -> Response:
    """Send a file. It needs no session: the files are the same in each installation."""
    name = request.path_params["name"]
    if name not in _files():
        return Response(status_code=404)
    headers = SAFE_HEADERS | {"cache-control": "public, max-age=31536000, immutable"}
    return Response(_files()[name][0], 200, headers, _TYPES[Path(name).suffix])
