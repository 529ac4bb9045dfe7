"""What the commands that speak to Clipia share."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from receiver.core.lenient_json import clean_body
from receiver.errors import ReceiverError, UnrecognizedBody
from receiver.logs import configure_logging
from receiver.submitter import Submitter

T = TypeVar("T")

Input = Annotated[
    str,
    typer.Option(
        "--input", "-i", help="The model's parameters: a JSON object, @FILE, or @- for standard input."
    ),
]

Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict/--no-strict",
        help="Refuse parameters that the model's schema does not have, or pass them with a warning. "
        "Default: as RECEIVER_INPUT_CHECK says, which passes them unless told.",
        show_default=False,
    ),
]


def with_submitter(use: Callable[[Submitter], Awaitable[T]]) -> T:
    """Run `use` with a submitter on the service's database and settings."""
    # The command itself says what goes wrong; the log would say it twice.
    configure_logging(level="CRITICAL")

    async def run() -> T:
        async with Submitter.open() as submitter:
            return await use(submitter)

    return asyncio.run(run())


def read_input(text: str) -> dict[str, Any]:
    """Read the value of `--input`. Raises ReceiverError, which says what to write."""
    # An argument that is no UTF-8 has surrogates for its bytes.
    content = text.encode(errors="surrogateescape")
    if text.startswith("@"):
        name = text[1:]
        try:
            content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        except OSError as error:
            raise ReceiverError(f"--input: {name} cannot be read: {error.strerror}") from None
    try:
        value, altered = clean_body(content)
    except UnrecognizedBody:
        raise ReceiverError('--input is not JSON; write \'{"prompt": "a cat"}\' or @FILE') from None
    if altered:
        raise ReceiverError(
            f"--input: cannot be sent as it is written, at {', '.join(altered[:5])}: "
            "write integers of 64 bits, whole characters, and each name once"
        )
    if not isinstance(value, dict):
        raise ReceiverError('--input: write a JSON object, as in \'{"prompt": "a cat"}\'')
    return value


def read_pair(text: str) -> tuple[str, str]:
    """Read a value of `--metadata`. Raises ReceiverError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ReceiverError(f"--metadata {text!r}: write NAME=VALUE")
    return name, value
