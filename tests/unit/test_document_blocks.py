"""Each fenced block of the pages can work: it is read as what it claims to be, without running it.

Blocks that are also run: the first steps (`tests/acceptance/test_first_steps.py`), the jobs and the consumers
(`tests/acceptance/test_documented_examples.py`, `tests/acceptance/test_documented_consumers.py`), and the
production layout of the README (`tests/support/production.py`).
"""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main
from support.servers import missing

from receiver.cli import app
from receiver.settings import Settings

ROOT: Final = Path(__file__).parents[2]
_BLOCK: Final = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_ASSIGNMENT: Final = re.compile(r"\w+=.*")
_OPERATORS: Final = frozenset("&|;<>()") | {"&&", "||", ">>"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def name(self) -> str:
        """The page and the first line, which name the block."""
        return f"{self.page}: {self.text.strip().splitlines()[0].strip()}"


UNREAD: Final[Mapping[str, str]] = {
    "": "output, or a drawing",
    "text": "output of commands, which the incidents' tests compare",
    "sql": "PostgreSQL's own words; tests/integration/test_requirements.py runs with less than these rights",
    "nginx": "tests/acceptance/test_nginx.py starts a configuration of its own",
    "yaml": "the standard library has no reader; its words are those of `receiver serve`",
    "ini": "systemd's own words",
}
"""Languages that no test here reads, with the reason."""
UNCHECKED: Final[Mapping[str, str]] = {
    "docs/operating.md: receiver migrate                                               "
    "# if the dump is of an older schema": "`serve …` stands for the options of the reader's own processes",
}
"""Single blocks that no test here reads, with the reason."""


def find_blocks() -> Iterator[Block]:
    """Yield the blocks of all pages."""
    pages = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for _indent, language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
            yield Block(str(page.relative_to(ROOT)), language, textwrap.dedent(text))


BLOCKS: Final = tuple(find_blocks())


def read_toml(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load it as settings; each variable that it refers to has a value."""
    for variable in re.findall(r"\$\{(\w+)\}", block.text):
        key = f'"${{{variable}}}"'
        is_key = f"clipia_key = {key}" in block.text
        monkeypatch.setenv(variable, "clipia_test_documents" if is_key else "whsec_MDEyMzQ1Njc4OWFiY2RlZg==")
    file = tmp_path / "receiver.toml"
    file.write_text(block.text, encoding="utf-8")
    monkeypatch.setenv("RECEIVER_CONFIG", str(file))
    Settings.load()


def read_json(block: Block) -> None:
    """Read it: one document, or one on each line."""
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        for line in block.text.splitlines():
            json.loads(line)


def read_python(block: Block) -> None:
    """Compile it, and find each name that it imports from the receiver."""
    tree = compile(block.text, block.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
    compile(tree, block.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "receiver":
            module = importlib.import_module(str(node.module))
            assert [each.name for each in node.names if not hasattr(module, each.name)] == []


def read_js(block: Block, tmp_path: Path) -> None:
    """Let Node read it."""
    if shutil.which("node") is None:
        missing("node", "apt-get install nodejs")
    file = tmp_path / "block.mjs"
    file.write_text(block.text, encoding="utf-8")
    done = subprocess.run(["node", "--check", file], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def read_sh(block: Block) -> None:
    """Parse each command of ours with the real command line; the others are the shell's."""
    for words in commands(block.text):
        program, *arguments = words
        if Path(program).name == "receiver":
            parse(arguments)
        elif words[:2] == ["docker", "run"]:
            parse(arguments[arguments.index("clipia-receiver") + 1 :])
        elif program == "make":
            assert [each for each in arguments if f"\n{each}: " not in MAKEFILE and "=" not in each] == []
        elif program.startswith("python") and arguments and arguments[0].startswith("benchmarks/"):
            source = (ROOT / arguments[0]).read_text(encoding="utf-8")
            options = [each for each in arguments if each.startswith("--") and each != "--help"]
            assert [each for each in options if f'"{each}"' not in source] == []
        else:
            assert not get_close_matches(program, ["receiver"]), f"is {program} a program?"


MAKEFILE: Final = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command, without variables in front of it."""
    # `<id>` stands for a word of the reader's.
    for line in re.sub(r"<(\w+)>", r"\1", text.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= _OPERATORS:
                while words and _ASSIGNMENT.fullmatch(words[0]):
                    del words[0]
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def parse(arguments: list[str]) -> None:
    """Parse the arguments of `receiver`; raises what a wrong name, option or value raises there."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("receiver", list(arguments))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


CHECKS: Final[Mapping[str, Callable[..., None]]] = {
    "js": read_js,
    "json": read_json,
    "python": read_python,
    "sh": read_sh,
    "toml": read_toml,
}


@pytest.mark.parametrize(
    "block",
    [each for each in BLOCKS if each.language not in UNREAD and each.name not in UNCHECKED],
    ids=lambda block: block.name,
)
def test_a_block_is_what_it_claims_to_be(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings load, JSON and programs are read, and commands exist with their options."""
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch}
    check = CHECKS[block.language]
    wanted = check.__code__.co_varnames[1 : check.__code__.co_argcount]
    check(block, **{name: given[name] for name in wanted})


def test_each_exception_is_needed() -> None:
    """A block that is gone leaves no exception behind."""
    assert UNCHECKED.keys() <= {each.name for each in BLOCKS}
