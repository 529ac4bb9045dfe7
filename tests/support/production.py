"""The README's production layout, as it is printed."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def layout() -> list[list[str]]:
    """Return the arguments of the processes in the README, with free ports."""
    section = README.read_text(encoding="utf-8").partition("## Running it for real")[2]
    block = section.partition("```sh\n")[2].partition("```")[0]
    lines = [line.partition("#")[0].split()[1:] for line in block.splitlines()]
    commands = [line for line in lines if line[0] in {"serve", "worker"}]
    return [
        [re.sub(r"^\d+$", "0", each) for each in line]
        + (["--port", "0"] if line[0] == "serve" and "--port" not in line else [])
        for line in commands
    ]
