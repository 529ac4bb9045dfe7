"""Files hold prompts, payloads, media and logs: they are made for their user and its group only."""

import os
from typing import Final

MODE: Final = 0o640
"""The mode of every file that is made here, less what the umask takes away."""


def private(path: str, flags: int) -> int:
    """Open a file, which is made with MODE; for the parameter `opener` of `open`."""
    return os.open(path, flags, MODE)
