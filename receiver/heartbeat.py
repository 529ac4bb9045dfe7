"""Heartbeat files: which receivers run in this container, for `receiver healthcheck`.

A running process keeps its file locked: a file that can be locked was left by a process that was killed.
This module imports little, because a health check runs every few seconds, often with a fraction of a CPU.
"""

import contextlib
import fcntl
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from receiver.files import open_private

BEAT: Final = 5.0
"""Seconds between two heartbeats of a worker."""
STALE: Final = 30.0
"""Seconds without a heartbeat after which a worker counts as hung."""
ANSWER_WAIT: Final = 2.0
"""Seconds that a web process may take to answer."""
ANY_ADDRESS: Final = {"0.0.0.0": ("127.0.0.1",), "::": ("::1", "127.0.0.1"), "": ("127.0.0.1",)}  # noqa: S104 - compared, not bound
"""Where to ask a process that listens on any address; a container may lack IPv6 on its loopback interface."""


class Heartbeat:
    """The heartbeat file of this process, from its construction to its end or `close`."""

    def __init__(self, command: str, *, address: tuple[str, int] | None = None, path: str = "") -> None:
        """Write the file. `address` is where the process answers `path`; without it the file must be touched.

        Raises OSError if no temporary folder can be written to.
        """
        folder = _make_folder()
        self._path = folder / f"{command}-{os.getpid()}-{time.monotonic_ns()}.json"
        fresh = self._path.with_suffix(".new")
        self._descriptor = open_private(str(fresh), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        content = {"command": command, "address": address, "path": path}
        try:
            # Locked before it has its name: a check that saw it unlocked would take its process for dead.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.write(self._descriptor, json.dumps(content).encode())
            fresh.rename(self._path)
        except OSError:
            fresh.unlink(missing_ok=True)
            os.close(self._descriptor)
            raise

    def touch(self) -> None:
        """Say that the process still works."""
        os.utime(self._descriptor)

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def run_check() -> int:
    """Print a line about each process that runs here; return 0 if all of them work, and 1 if not."""
    works, lines = check()
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0 if works else 1


def check() -> tuple[bool, list[str]]:
    """Return whether everything that runs here works, and a line about each process."""
    verdicts = [_judge(found, age) for found, age in _running()]
    if not verdicts:
        return False, [
            "neither `receiver serve` nor `receiver worker` runs here, or it could not write to /tmp"
        ]
    return all(works for works, _ in verdicts), [line for _, line in verdicts]


def _judge(found: dict[str, Any], age: float) -> tuple[bool, str]:
    command = found["command"]
    if found["address"] is None:
        return age < STALE, f"{command}: last heartbeat {age:.0f} s ago"
    host, port = found["address"]
    said = ""
    for address in ANY_ADDRESS.get(host, (host,)):
        where = f"http://{f'[{address}]' if ':' in address else address}:{port}{found['path']}"
        try:
            answer = _ask(address, port, found["path"])
        except OSError as error:
            said = f"{command}: {where} does not answer ({type(error).__name__})"
            if isinstance(error, TimeoutError):
                # It hangs, and the health check has no time to wait for it twice.
                break
        else:
            said = f"{command}: {where} answers {answer.decode('ascii', 'replace')}"
            return answer.split()[1:2] == [b"200"], said
    return False, said


def _ask(host: str, port: int, path: str) -> bytes:
    """Return the status line of the answer. Raises OSError."""
    with socket.create_connection((host, port), timeout=ANSWER_WAIT) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            return answer.readline(256).strip()


def _running() -> Iterator[tuple[dict[str, Any], float]]:
    """Yield the content and the age in seconds of the heartbeat of each process that runs."""
    for folder in _folders():
        if not _is_ours(folder):
            continue
        for path in sorted(folder.glob("*.json")):
            with contextlib.suppress(OSError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    age = time.time() - os.fstat(file.fileno()).st_mtime
                    yield json.loads(file.read()), max(0.0, age)
                else:
                    path.unlink(missing_ok=True)


def _folders() -> list[Path]:
    # With a read-only root /dev/shm can still be written to, unless the platform says otherwise.
    bases = (os.environ.get("TMPDIR") or "/tmp", "/dev/shm")  # noqa: S108 - the folder below is checked
    return [Path(base) / f"clipia-receiver-{os.geteuid()}" for base in bases]


def _make_folder() -> Path:
    reason: OSError = FileNotFoundError("no temporary folder")
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if _is_ours(folder) and os.access(folder, os.W_OK):
                return folder
        except OSError as error:
            reason = error
    raise reason


def _is_ours(folder: Path) -> bool:
    """Tell whether the folder is this user's: anybody may have made one of its name in /tmp."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
