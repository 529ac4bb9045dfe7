"""What the commands that speak to Clipia share."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import typer

from receiver.errors import ReceiverError
from receiver.observability import configure_logging
from receiver.submitter import Submitter

T = TypeVar("T")

Input = Annotated[
    str,
    typer.Option(
        "--input", "-i", help="The model's parameters: a JSON object, @FILE, or @- for standard input."
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
    content: str | bytes = text
    if text.startswith("@"):
        name = text[1:]
        try:
            content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        except OSError as error:
            raise ReceiverError(f"--input: {name} cannot be read: {error.strerror}") from None
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ReceiverError(
            f'--input is not JSON ({error}); write \'{{"prompt": "a cat"}}\' or @FILE'
        ) from None
    if not isinstance(value, dict):
        raise ReceiverError('--input: write a JSON object, as in \'{"prompt": "a cat"}\'')
    return value


def read_pair(text: str) -> tuple[str, str]:
    """Read a value of `--metadata`. Raises ReceiverError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ReceiverError(f"--metadata {text!r}: write NAME=VALUE")
    return name, value
