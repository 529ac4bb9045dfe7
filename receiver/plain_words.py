"""The words of the validation library, said as advice; pure."""

import re
from typing import Final

_WORDS: Final = tuple(
    (re.compile(pattern, re.DOTALL), words)
    for pattern, words in (
        (r"Value error, (.*)", r"\1"),
        (r"Input should be a valid integer\b.*", "write a whole number"),
        (r"Input should be a valid number\b.*", "write a number"),
        (r"Input should be a valid boolean\b.*", "write true or false"),
        (r"Input should be a valid UUID\b.*", "write an id such as 01a1fe1f-4d6d-74d7-af73-a0b5ac94520e"),
        (r"Input should be a valid string\b.*", "write a text"),
        (r"Input should be a valid dictionary\b.*", "write an object"),
        (r"Input should be a valid list\b.*", "write a list"),
        (r"Input should be greater than or equal to (\S+)", r"write \1 or more"),
        (r"Input should be less than or equal to (\S+)", r"write \1 or less"),
        (r"Input should be greater than (\S+)", r"write more than \1"),
        (r"Input should be less than (\S+)", r"write less than \1"),
        (r"Input should be ('.*)", r"write \1"),
        (r"String should have at least (\d+) characters?", r"write at least \1 characters"),
        (r"String should have at most (\d+) characters?", r"write at most \1 characters"),
        (r"Field required", "it is missing"),
    )
)


def in_our_words(text: str) -> str:
    """Return the text of an error of pydantic as advice; a text that is not known is returned as it is."""
    for pattern, words in _WORDS:
        if found := pattern.fullmatch(text):
            return found.expand(words)
    return text
