"""Ranges of bytes as requests ask for them."""

import pytest

from receiver.core.byte_range import find_range

SIZE = 100


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=10-19", (10, 20)),
        ("bytes=99-", (99, 100)),
        ("bytes=0-999999999999999999", (0, 100)),
        ("bytes=-1", (99, 100)),
        ("bytes=-100", (0, 100)),
        ("bytes=-101", (0, 100)),
        ("BYTES=0-9", (0, 10)),
        (" bytes=0-9 ", (0, 10)),
        (None, None),
        ("", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=20-10", None),
        ("bytes=a-b", None),
        ("bytes=1-2,3-4", None),
        ("bytes=0-" + ",0-" * 10_000, None),
        ("bytes=" + "9" * 5000 + "-", None),
        ("bytes=٣-٤", None),
        ("items=0-9", None),
        ("bytes 0-9", None),
    ],
)
def test_one_range_is_read_and_anything_else_is_the_whole_file(
    header: str | None, expected: tuple[int, int] | None
) -> None:
    """D14: one range of bytes is cut to the file; several, malformed and other ones are ignored."""
    assert find_range(header, SIZE) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=999999999999999999-", "bytes=-0"])
def test_a_range_without_a_byte_of_the_file_is_an_error(header: str) -> None:
    """A range behind the end, and the last 0 bytes, have no byte of the file."""
    with pytest.raises(ValueError, match="no byte"):
        find_range(header, SIZE)


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=-1", "bytes=0-0"])
def test_an_empty_file_has_no_ranges(header: str) -> None:
    """Every range of an empty file is an error."""
    with pytest.raises(ValueError, match="no byte"):
        find_range(header, 0)
