"""Write the lists of tests in `docs/faults.md`: `python tests/support/fault_catalogue.py`.

With `--check` the page is left alone, and the exit status is 1 if it is out of date or incomplete.
"""

import ast
import functools
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
PAGE: Final = TESTS.parent / "docs" / "faults.md"

_ID: Final = re.compile(r"\b([A-GT])([0-9]{1,2})(?:-\1([0-9]{1,2}))?\b")
_ENTRY: Final = re.compile(r"- \*\*([A-GT][0-9]{1,2})\*\* .+")
_TESTS: Final = "  *Tests:* "
_NO_TEST: Final = "  *No test:* "
_LINK: Final = re.compile(r"\[\w+\]: \.\./tests/\S+")


def parse_ids(docstring: str) -> set[str]:
    """Return the ids before the colon of a test's docstring, with a range such as B7-B9 spelled out."""
    return {
        f"{section}{number}"
        for section, first, last in _ID.findall(docstring.partition(":")[0])
        for number in range(int(first), int(last or first) + 1)
    }


@functools.cache
def cited_ids() -> Mapping[str, frozenset[Path]]:
    """Return the test files that name each id."""
    found: defaultdict[str, set[Path]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                for fault in parse_ids(ast.get_docstring(node) or ""):
                    found[fault].add(path)
    return {fault: frozenset(paths) for fault, paths in found.items()}


def render(page: str, cited: Mapping[str, frozenset[Path]]) -> str:
    """Return the page with the present lists of tests and links; all other lines stay."""
    lines: list[str] = []
    fault = ""
    for line in [*_written_by_hand(page), ""]:
        # The list belongs behind the last line of its entry.
        if fault and not line.startswith("  "):
            lines += _test_list(cited.get(fault, frozenset()))
            fault = ""
        if entry := _ENTRY.fullmatch(line):
            fault = entry[1]
        lines.append(line)
    paths = sorted({path for paths in cited.values() for path in paths})
    links = [f"[{path.stem}]: ../{path.relative_to(TESTS.parent).as_posix()}" for path in paths]
    return "\n".join([*lines, *links, ""])


def find_problems(page: str, cited: Mapping[str, frozenset[Path]]) -> list[str]:
    """Return a sentence for each id that is missing, doubled or unproved."""
    excuses: dict[str, bool] = {}
    problems: list[str] = []
    fault = ""
    for line in _written_by_hand(page):
        if entry := _ENTRY.fullmatch(line):
            fault = entry[1]
            if fault in excuses:
                problems.append(f"{fault} has two entries")
            excuses[fault] = False
        elif line.startswith(_NO_TEST):
            excuses[fault] = True
    problems += [f"{fault} is named by tests and has no entry" for fault in sorted(cited.keys() - excuses)]
    for fault, excused in excuses.items():
        if excused and fault in cited:
            problems.append(f"{fault} has a test: remove its sentence '{_NO_TEST.strip()}'")
        if not excused and fault not in cited:
            problems.append(f"{fault} has no test: name it in one, or add a sentence '{_NO_TEST.strip()} …'")
    return problems


def _written_by_hand(page: str) -> list[str]:
    """Return the lines that are not generated, without blank lines at the end."""
    lines: list[str] = []
    in_list = False
    for line in page.splitlines():
        in_list = line.startswith(_TESTS) or (in_list and line.startswith("  "))
        if not in_list and not _LINK.fullmatch(line):
            lines.append(line)
    while lines and not lines[-1]:
        del lines[-1]
    return lines


def _test_list(paths: frozenset[Path]) -> list[str]:
    names = ", ".join(f"[{path.stem}]" for path in sorted(paths))
    return textwrap.wrap(names, 120, initial_indent=_TESTS, subsequent_indent="  ") if names else []


def main() -> int:
    """Check or rewrite the page; return the exit status."""
    page = PAGE.read_text(encoding="utf-8")
    current = render(page, cited_ids())
    problems = find_problems(page, cited_ids())
    if "--check" in sys.argv[1:]:
        if current != page:
            problems.append("docs/faults.md is out of date: run python tests/support/fault_catalogue.py")
    else:
        PAGE.write_text(current, encoding="utf-8")
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
