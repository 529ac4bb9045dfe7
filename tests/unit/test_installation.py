"""All installed packages are pinned with hashes, and every documented way installs the same ones."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.servers import require

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.txt", "requirements-build.txt", "requirements-dev.txt")


def pins(name: str) -> dict[str, Requirement]:
    """Return the requirements of a locked file by name."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    found = [Requirement(line.partition(" --hash=")[0]) for line in text.splitlines()]
    return {canonicalize_name(each.name): each for each in found}


def demanded(pin: Requirement) -> Iterator[Requirement]:
    """Yield the requirements of an installed pin with its extras; a pin that this platform skips has none."""
    try:
        listed = requires(pin.name) or []
    except PackageNotFoundError:
        return
    for each in map(Requirement, listed):
        extras = pin.extras or {""}
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
            yield each


@pytest.mark.parametrize("name", LOCKS)
def test_every_extra_that_is_demanded_stands_in_its_pin(name: str) -> None:
    """A pin names its extra: pip before 23.3 takes one without it for another requirement, without a hash."""
    pinned = pins(name)
    for pin in pinned.values():
        for wanted in demanded(pin):
            held = pinned.get(canonicalize_name(wanted.name))
            assert held is not None, f"{name}: {pin.name} needs {wanted}, which has no pin"
            assert wanted.extras <= held.extras, f"{name}: {pin.name} needs {wanted}, and the pin is {held}"


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_is_one_version_with_its_hashes(name: str) -> None:
    """G12: a package is installed only if it is pinned by version and hash."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        assert re.match(r"[\w.\[\],-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line), line


def test_the_locked_files_agree() -> None:
    """A package has the same version in each file: they are installed into one environment."""
    development = pins("requirements-dev.txt")
    for name in LOCKS:
        for package, pin in pins(name).items():
            assert development[package].specifier == pin.specifier, f"{name}: {pin}"


def pip_commands(name: str) -> list[list[str]]:
    """Return the arguments of the pip commands in a file, without those that have no effect."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    text = text.replace("$(PIP_INSTALL)", "python -m pip install")
    text = re.sub(r"^PIP_INSTALL :=.*", "", text, flags=re.MULTILINE)
    quiet = {"--quiet", "--disable-pip-version-check"}
    return [
        [word for word in shlex.split(command) if word not in quiet]
        for command in re.findall(r"\bpip ((?:install|wheel|download) [^\n&;`|)]*)", text)
    ]


def packaging_files() -> list[str]:
    """Return the files of the repository that may install a package."""
    names = ["README.md", "Makefile", "Dockerfile", ".ci/run"]
    return names + [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]


def test_make_and_the_readme_install_alike() -> None:
    """The commands for a reader without make install the same packages as make."""
    wanted = [
        ["install", "--require-hashes", "-r", "requirements-build.txt", "-r", "requirements.txt"],
        ["install", "--no-deps", "--no-build-isolation", "-e", "."],
        ["install", "--require-hashes", "-r", "requirements-dev.txt"],
    ]
    assert pip_commands("README.md") == wanted
    # The last command of the Makefile installs the tool that makes the pins.
    assert pip_commands("Makefile") == [*wanted, ["install", "uv"]]


@pytest.mark.parametrize("name", packaging_files())
def test_nothing_is_installed_without_a_hash(name: str) -> None:
    """G12: requirements come from a locked file, and so do the tools that build the package."""
    for _command, *arguments in pip_commands(name):
        if arguments == ["uv"] or any(each.startswith("clipia-receiver[") for each in arguments):
            continue  # the tool of `make lock`; a user's own project
        if "--require-hashes" in arguments:
            files = [word for word in arguments if word not in {"--require-hashes", "-r"}]
            assert set(files) <= set(LOCKS), arguments
        else:
            built = [word for word in arguments if not word.startswith("-")][-1]
            assert "--no-deps" in arguments, arguments
            assert "--no-build-isolation" in arguments or built.endswith(".whl"), arguments


def test_the_readme_puts_the_command_on_the_path_before_it_is_used() -> None:
    """The commands of the README work as they are, from top to bottom."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    before, export, _ = shell.partition('export PATH="$PWD/.venv/bin:$PATH"')
    assert export
    assert not re.search(r"^receiver ", before, re.MULTILINE)
    assert ".venv/bin/receiver" not in shell


def test_the_image_copies_only_what_its_context_has() -> None:
    """Each file of a COPY is allowed by `.dockerignore`, because no test builds the image."""
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for copied in re.findall(r"^COPY (?!--from)(.+)", text, re.MULTILINE):
        *names, _target = copied.split()
        assert set(names) <= allowed


@pytest.mark.parametrize(
    ("program", "version"), [("exit 1", "Python 3.10.13"), ("exit 1", ""), ("exit 127", "")]
)
def test_make_names_the_python_that_it_needs(tmp_path: Path, program: str, version: str) -> None:
    """With Python 3.10, or without venv, or without Python, one sentence is printed and no word of pip's."""
    require("make")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo '{version}' && exit 0\n{program}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    said, error = done.stderr.splitlines()
    assert said.startswith(
        "Python >= 3.11 with venv is needed (Debian, Ubuntu: apt-get install python3-venv)"
    )
    assert version in said
    assert error.startswith("make: ***")
    assert not (tmp_path / "venv").exists()
