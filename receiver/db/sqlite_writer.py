"""The process that writes webhooks to SQLite, so that its statements need not wait for the web process's GIL.

It runs as a script and imports the standard library only, so that it starts at once and stays small. It ends
if its parent closes the socket, which is its standard input, or dies.
"""

import contextlib
import marshal
import os
import pickle
import signal
import socket
import sqlite3
from collections.abc import Sequence
from io import BufferedRWPair
from typing import Any, Final

Statement = tuple[str, Sequence[Any]]
"""SQL and its parameters, of types that `marshal` takes."""

HEAD_BYTES: Final = 4
"""The length of a message, before it."""


class ArrivalWriter:
    """Runs the statements that store webhooks, each as a transaction of its own."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._known: list[str] = []
        # SQLite has no RETURNING of rows in conflict.
        connection.create_function("is_known", 1, self._known.append)

    def run(self, statements: Sequence[Statement]) -> list[str]:
        """Run the statements in their order; return the ids for which they called `is_known`."""
        self._known.clear()
        for statement, values in statements:
            self._connection.execute(statement, values)
        return self._known.copy()


def set_up(connection: sqlite3.Connection, *, foreign_keys: bool = True) -> None:
    """Make a new connection's commits durable."""
    # Otherwise pysqlite issues its own BEGIN, which takes no write lock, and updates get lost silently.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"foreign_keys={foreign_keys:d}"):
        connection.execute(f"PRAGMA {pragma}").close()


def frame(message: Any) -> bytes:
    """Return a message as it is sent."""
    data = marshal.dumps(message)
    return len(data).to_bytes(HEAD_BYTES, "big") + data


def serve(stream: BufferedRWPair) -> None:
    """Read the arguments of `sqlite3.connect`, then groups of statements, and answer each group.

    An answer is the result of `run`, or else the pickled error.
    """
    path, options = _receive(stream)
    statements = _receive(stream)
    # If the file cannot be opened, the process ends, and the thread of the parent stores the group.
    with contextlib.closing(sqlite3.connect(path, **options)) as connection:
        set_up(connection)
        writer = ArrivalWriter(connection)
        while True:
            try:
                answer = frame((writer.run(statements), None))
            except Exception as error:  # noqa: BLE001 - the parent raises it
                answer = frame((None, pickle.dumps(error)))
            stream.write(answer)
            stream.flush()
            statements = _receive(stream)


def _receive(stream: BufferedRWPair) -> Any:
    size = int.from_bytes(_read(stream, HEAD_BYTES), "big")
    return marshal.loads(_read(stream, size))  # noqa: S302 - from the parent


def _read(stream: BufferedRWPair, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Serve the parent until it is gone."""
    # Ctrl-C and systemd's SIGTERM go to all processes, and the parent has webhooks to store even then.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # SQLite makes a file that all users can read if the database is gone.
    os.umask(0o077)
    with (
        contextlib.suppress(EOFError, OSError, sqlite3.Error),
        socket.socket(fileno=0) as parent,
        parent.makefile("rwb") as stream,
    ):
        serve(stream)


if __name__ == "__main__":
    main()
