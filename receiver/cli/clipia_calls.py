"""Shared parts of the commands that use Clipia's API."""

from typing import Annotated, Any, TypeVar

import typer

from receiver.cli.terminal import read_file
from receiver.core.lenient_json import clean_body
from receiver.errors import UnrecognizedBody, UsageError

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
        help="Reject parameters that the model's input schema does not have, or send them with a warning. "
        "Default: RECEIVER_INPUT_CHECK, or else send them.",
        show_default=False,
    ),
]


def read_input(text: str) -> dict[str, Any]:
    """Return the object that `--input` contains, or that its file contains. Raises UsageError."""
    # Bytes of an argument that are not UTF-8 arrive as surrogates.
    content = text.encode(errors="surrogateescape")
    if text.startswith("@"):
        content = read_file(text[1:])
    try:
        value, altered = clean_body(content)
    except UnrecognizedBody:
        raise UsageError('--input is not JSON; write \'{"prompt": "a cat"}\' or @FILE') from None
    if altered:
        raise UsageError(
            f"--input: the values at {', '.join(altered[:5])} cannot be sent to Clipia: "
            "write integers of at most 64 bits, complete Unicode characters, and each name once"
        )
    if not isinstance(value, dict):
        raise UsageError('--input: write a JSON object, as in \'{"prompt": "a cat"}\'')
    return value
