"""Files and folders that are readable only by the service's user and group, and written durably.

They hold prompts, payloads, media and logs.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

MODE: Final = 0o640
"""The mode of a new file; the umask may remove more bits."""
FOLDER_MODE: Final = 0o750
"""The mode of a new folder, whatever the umask is."""
_OTHERS: Final = 0o007


def open_private(path: str, flags: int) -> int:
    """Open a file and return its descriptor; a new file gets MODE. Fits `open(…, opener=open_private)`."""
    return os.open(path, flags, MODE)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`.

    One `os.write` may write less: if the disk or a quota fills up, it writes a part, and only the next call
    raises the error.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_folder(path: Path, *, flush: bool = True) -> None:
    """Make a folder and its parents, each flushed to the disk: `mkdir` alone may not survive a power cut.

    Without `flush` the caller calls `sync_folder` itself.
    """
    if not path.is_dir():
        make_folder(path.parent, flush=flush)
        try:
            path.mkdir(mode=FOLDER_MODE)
        except FileExistsError:  # another process made it, and maybe an operator changed its mode
            if not path.is_dir():
                raise
        else:
            path.chmod(FOLDER_MODE)
        if flush:
            sync_folder(path.parent)


def open_to_others(paths: Iterable[Path]) -> list[Path]:
    """Return those files that users outside of the service's group can read or write."""
    return [path for path in paths if path.exists() and path.stat().st_mode & _OTHERS]


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to the disk: new names, renames and removals."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
