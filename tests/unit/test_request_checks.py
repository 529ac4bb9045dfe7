"""Checks of the values that the API, the commands and the submitter share."""

from collections.abc import Callable

import pytest
from pydantic import BaseModel, ValidationError

from receiver.core.request_values import check_caller, check_key, first_problem, invalid_request, read_cursor
from receiver.errors import RequestError


class _Order(BaseModel):
    names: list[int]


def _error(values: object) -> ValidationError:
    """Return the ValidationError of these values."""
    with pytest.raises(ValidationError) as caught:
        _Order.model_validate(values)
    return caught.value


@pytest.mark.parametrize(("check", "longest"), [(check_caller, 63), (check_key, 255)])
def test_names_and_keys(check: Callable[[str], str], longest: int) -> None:
    """F8: a name or a key is returned unchanged if it is printable and not too long."""
    for text in ("x", "two words", "ключ", "x" * longest):
        assert check(text) == text
    for text in ("", "x" * (longest + 1), "a\nb", "a\0b", "\ud800"):
        with pytest.raises(RequestError, match=f"from 1 to {longest} printable") as caught:
            check(text)
        assert caught.value.code == "invalid_request"


def test_cursors() -> None:
    """A cursor is a number of up to 18 ASCII digits; without one, the list begins at its first page."""
    assert [read_cursor(text) for text in (None, "0", "9" * 18)] == [None, 0, 10**18 - 1]
    for text in ("", "-1", "1.5", " 1", "\u0661", "9" * 19):
        with pytest.raises(RequestError, match="previous page"):
            read_cursor(text)


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        ({"names": [1, "x"]}, ("names", "1"), "names.1: "),
        ({}, ("names",), "names: it is missing"),
        ([], (), "the body: "),
    ],
)
def test_the_first_problem(values: object, path: tuple[str, ...], message: str) -> None:
    """If a body is invalid, the error names its first invalid field."""
    assert first_problem(_error(values))[0] == path
    error = invalid_request(_error(values))
    assert (str(error)[: len(message)], error.code) == (message, "invalid_request")


def test_long_names_are_cut() -> None:
    """If a field's name is very long, the error has its beginning."""

    class Closed(BaseModel, extra="forbid"):
        pass

    with pytest.raises(ValidationError) as caught:
        Closed.model_validate({"x" * 1000: 1})
    assert first_problem(caught.value)[0] == ("x" * 64,)
