"""Run a documented consumer with a `handle`, log its steps, and kill it if an event asks for that."""

import builtins
import json
import os
import runpy
import signal
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

current: dict[str, Any] = {}


def note(file: str, text: str) -> None:
    """Append a line to a file of the test."""
    with Path(file).open("a", encoding="utf-8") as lines:
        lines.write(f"{text}\n")


def die_if_asked(moment: str) -> None:
    """Die as if by SIGKILL, once, if the current event asks for it."""
    mark = Path(f"died-{current.get('id')}")
    if current.get("data", {}).get("die") == moment and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Database(sqlite3.Connection):
    """The consumer's database."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Log every event that is looked up."""
        if "INTO seen" in sql:
            note("offered", parameters[0])
        return super().execute(sql, parameters)

    def __exit__(self, *error: Any) -> Any:  # noqa: PYI036 - passed on to the base class
        super().__exit__(*error)
        die_if_asked("after the commit")

    def handle(self, event: Mapping[str, Any]) -> None:
        """Keep the event; this is the consumer's work."""
        current.clear()
        current.update(event)
        note("calls", event["id"])
        self.execute("INSERT INTO work VALUES (?)", [json.dumps(event)])
        die_if_asked("before the commit")


def connect(name: str) -> Database:
    """Open the database and replace the consumer's `handle`."""
    database = plain_connect(name, factory=Database)
    database.execute("CREATE TABLE IF NOT EXISTS work (event TEXT)")
    vars(builtins)["handle"] = database.handle
    return database


plain_connect = sqlite3.connect
vars(sqlite3)["connect"] = connect
if "aiokafka" in Path(sys.argv[1]).read_text(encoding="utf-8"):
    import aiokafka

    # A consumer group waits that long for a member that was killed.
    waits = {"session_timeout_ms": 1500, "heartbeat_interval_ms": 400}
    aiokafka.AIOKafkaConsumer.__init__.__kwdefaults__.update(waits)
runpy.run_path(sys.argv[1], run_name="__main__")
