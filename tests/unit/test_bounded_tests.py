"""If the code is wrong, a test must fail and not hang."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Yield every node of every test file, with its place."""
    for path in sorted(TESTS.rglob("*.py")):
        name = str(path.relative_to(TESTS))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{name}:{getattr(node, 'lineno', 0)}", node


def is_endless(loop: ast.AST) -> bool:
    """Return whether a loop has no end of its own: `while True`, or over `itertools.count()` and similar."""
    if isinstance(loop, ast.While):
        return isinstance(loop.test, ast.Constant) and not any(
            isinstance(each, ast.Break | ast.Return | ast.Assert | ast.Raise) for each in ast.walk(loop)
        )
    endless = ("count(", "cycle(", "repeat(")
    return isinstance(loop, ast.For) and ast.unparse(loop.iter).removeprefix("itertools.").startswith(endless)


def test_no_body_is_sent_without_end() -> None:
    """An endless sender would fill the memory if the limit under test is missing, so it must be bounded."""
    found = [
        place
        for place, node in nodes()
        if is_endless(node) and any(isinstance(each, ast.Yield) or writes(each) for each in ast.walk(node))
    ]
    assert found == []


def writes(node: ast.AST) -> bool:
    """Return whether a node is a call that writes or sends."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"write", "send", "sendall"}
    )


def test_every_process_is_waited_for_with_a_limit() -> None:
    """If a command hangs, it is killed, and its output is in the error."""
    found = [
        f"{place} {ast.unparse(node.func)}"
        for place, node in nodes()
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("subprocess.run", ".process.communicate"))
        and "timeout" not in {keyword.arg for keyword in node.keywords}
    ]
    assert found == []
