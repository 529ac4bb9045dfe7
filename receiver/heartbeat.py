"""Heartbeat files: one for each receiver process in this container, for `receiver healthcheck`.

A running process keeps its file locked. If a file can be locked, its process was killed.
This module imports little, because a health check runs every few seconds, often on a fraction of a CPU.
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

from receiver.private_files import open_private

BEAT_SECONDS: Final = 5.0
"""The time between two heartbeats of a worker."""
STALE_SECONDS: Final = 30.0
"""A worker without a heartbeat for this long counts as hung."""
ANSWER_SECONDS: Final = 2.0
"""The longest time that a web process may take to answer."""
ANY_ADDRESS: Final = {"0.0.0.0": ("127.0.0.1",), "::": ("::1", "127.0.0.1"), "": ("127.0.0.1",)}  # noqa: S104 - compared, not bound
"""The addresses to try for a process that listens on any address; a container's loopback may have no IPv6."""


class Heartbeat:
    """The heartbeat file of this process, until `close` or the end of the process."""

    def __init__(self, command: str, *, address: tuple[str, int] | None = None, path: str = "") -> None:
        """Write the file.

        A web process gives its `address` and a `path` for the check to request; a worker gives none and calls
        `touch`. Raises OSError if no temporary folder is writable.
        """
        folder = _make_folder()
        self._path = folder / f"{command}-{os.getpid()}-{time.monotonic_ns()}.json"
        fresh = self._path.with_suffix(".new")
        self._descriptor = open_private(str(fresh), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        content = {"command": command, "address": address, "path": path}
        try:
            # The lock comes before the final name: a check would take an unlocked file for a dead process's.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.write(self._descriptor, json.dumps(content).encode())
            fresh.rename(self._path)
        except OSError:
            fresh.unlink(missing_ok=True)
            os.close(self._descriptor)
            raise

    def touch(self) -> None:
        """Report that the process still works."""
        os.utime(self._descriptor)

    def close(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def run_check() -> int:
    """Print a line for each process of this container; return 0 if all of them work, else 1."""
    works, lines = check()
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0 if works else 1


def check() -> tuple[bool, list[str]]:
    """Return whether all processes of this container work, and a line for each."""
    verdicts = [_judge(found, age) for found, age in _running()]
    if not verdicts:
        return False, [
            "no `receiver serve` or `receiver worker` runs in this container, or it cannot write to /tmp"
        ]
    return all(works for works, _ in verdicts), [line for _, line in verdicts]


def _judge(found: dict[str, Any], age: float) -> tuple[bool, str]:
    command = found["command"]
    if found["address"] is None:
        return age < STALE_SECONDS, f"{command}: last heartbeat {age:.0f} s ago"
    host, port = found["address"]
    line = ""
    for address in ANY_ADDRESS.get(host, (host,)):
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}{found['path']}"
        try:
            answer = _request(address, port, found["path"])
        except OSError as error:
            line = f"{command}: {url} does not answer ({type(error).__name__})"
            if isinstance(error, TimeoutError):
                # The process hangs, and the health check has no time for a second timeout.
                break
        else:
            line = f"{command}: {url} answers {answer.decode('ascii', 'replace')}"
            return answer.split()[1:2] == [b"200"], line
    return False, line


def _request(host: str, port: int, path: str) -> bytes:
    """Send a GET request and return the status line of the answer. Raises OSError."""
    with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            return answer.readline(256).strip()


def _running() -> Iterator[tuple[dict[str, Any], float]]:
    """Yield the content and the age in seconds of each running process's heartbeat."""
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
    # If the root is read-only, /dev/shm is usually still writable.
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
    """Return whether this user owns the folder: in /tmp another user may have made one of the same name."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
