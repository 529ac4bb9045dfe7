"""One range of bytes as a request asks for it (RFC 9110, section 14); pure."""

import re
from typing import Final

# A number of more digits is beyond every file; `int` would take long for thousands of them.
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.IGNORECASE | re.ASCII)


def find_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the start and the end (exclusive) of the range that `header` asks for; None for the whole file.

    Several ranges, another unit and a malformed header are ignored, as the standard allows: an answer of
    thousands of overlapping parts would cost more than the file. Raises ValueError if no byte is in the
    range.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or found[0].endswith("=-"):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    if start >= end:
        raise ValueError("no byte is in the range")
    return start, end
