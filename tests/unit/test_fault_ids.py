"""The catalogue of faults is complete and current: each fault has a test that names it, or a reason."""

from pathlib import Path

import pytest
from support.fault_catalogue import PAGE, cited_ids, find_problems, parse_ids, render

CITED = {"A1": frozenset([Path(__file__)])}
ENTRY = "- **A1** A fault\n  in two lines.\n"


def test_the_catalogue_of_faults_is_complete() -> None:
    """Each id that a test names has an entry, and each entry a test or a sentence that says why not."""
    assert find_problems(PAGE.read_text(encoding="utf-8"), cited_ids()) == []


def test_the_lists_of_tests_are_current() -> None:
    """If this fails, run `python tests/support/fault_catalogue.py`."""
    page = PAGE.read_text(encoding="utf-8")
    assert render(page, cited_ids()) == page


@pytest.mark.parametrize(
    ("docstring", "ids"),
    [
        ("A1: a sentence.", {"A1"}),
        ("B7-B9, T12: a sentence.", {"B7", "B8", "B9", "T12"}),
        ("A sentence: A1 stands behind the colon.", set()),
        ("H1, S3: other letters, and utf8.", set()),
        ("", set()),
    ],
)
def test_ids_stand_before_the_colon(docstring: str, ids: set[str]) -> None:
    """A range names all its ids."""
    assert parse_ids(docstring) == ids


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        (ENTRY, None),
        (ENTRY + "- **A2** Another.\n  *No test:* a reason.\n", None),
        ("", "A1 is named by tests and has no entry"),
        (ENTRY + ENTRY, "A1 has two entries"),
        (ENTRY + "- **A2** Another.\n", "A2 has no test"),
        (ENTRY + "  *No test:* a reason.\n", "A1 has a test"),
    ],
)
def test_problems_are_named(page: str, problem: str | None) -> None:
    """An entry that is missing, doubled, unproved or wrongly excused is one sentence."""
    problems = find_problems(page, CITED)
    assert (problem is None and not problems) or (problem is not None and problems[0].startswith(problem))


def test_lists_are_written_anew() -> None:
    """A list that is there is replaced, and what was written by hand stays."""
    link = "[test_fault_ids]: ../tests/unit/test_fault_ids.py\n"
    current = ENTRY + "  *Tests:* [test_fault_ids]\n\n## B\n\n" + link
    assert render(ENTRY + "\n## B\n", CITED) == current
    assert render(current, CITED) == current
    assert (
        render(current.replace("fault_ids]\n", "gone], [test_other],\n  [test_third]\n", 1), CITED) == current
    )
