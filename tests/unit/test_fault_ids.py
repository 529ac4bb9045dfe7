"""Every known fault of the signature, of the request and of jobs has a test that names it."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROWS = [
    f"{letter}{number}" for letter, last in (("A", 18), ("B", 13), ("F", 13)) for number in range(1, last + 1)
]


@functools.cache
def named_ids() -> set[str]:
    """Return the ids before the colon of each test's docstring, ranges such as B7-B11 spelled out."""
    found: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                head = (ast.get_docstring(node) or "").partition(":")[0]
                found |= set(re.findall(r"\b[A-GT]\d{1,2}\b", head))
                for letter, first, last in re.findall(r"\b([A-GT])(\d+)-\1(\d+)\b", head):
                    found |= {f"{letter}{number}" for number in range(int(first), int(last) + 1)}
    return found


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_a_test(row: str) -> None:
    """The list of faults is only worth what is tested of it."""
    assert row in named_ids()
