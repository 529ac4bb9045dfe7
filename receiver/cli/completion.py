"""Values that a shell completes: names of destinations and models, without a request and in a moment.

To import the settings as a whole and the database's libraries would take longer than a Tab should.
"""

import os
import sqlite3
from contextlib import closing
from typing import Any, Final
from urllib.parse import urlsplit

MODELS: Final = (
    *("nano-banana-2", "seedance-2-fast-i2v", "seedance-2-fast-t2v", "video-upscale"),
    *("gemini-3-1-flash-tts", "suno-music"),
)
"""Models that Clipia documents; the sandbox has them, too."""
_RECENT: Final = (
    "SELECT model FROM (SELECT model FROM jobs ORDER BY seq DESC LIMIT 1000) "
    "UNION SELECT model FROM (SELECT model FROM events ORDER BY seq DESC LIMIT 1000)"
)


def complete_destination(incomplete: str) -> list[str]:
    """Return the configured destinations that start so."""
    settings = _read_settings()
    tables = settings.get("destinations")
    names = [table.get("name") for table in tables] if isinstance(tables, list) else []
    if os.environ.get("RECEIVER_DESTINATION_URL") or settings.get("destination_url"):
        names.append("default")
    return sorted(name for name in names if isinstance(name, str) and name.startswith(incomplete))


def complete_model(incomplete: str) -> list[str]:
    """Return the documented models and the latest ones of this machine's SQLite file that start so."""
    found = {*MODELS, *_models_of_file()}
    return sorted(name for name in found if name.startswith(incomplete))


def _read_settings() -> dict[str, Any]:
    from receiver.config_file import read_file  # noqa: PLC0415 - only if a value is completed
    from receiver.errors import SettingsError  # noqa: PLC0415 - likewise

    try:
        return dict(read_file(os.environ))
    except SettingsError:
        # A message would be printed into the command line that is being typed.
        return {}


def _models_of_file() -> list[str]:
    url = os.environ.get("RECEIVER_DATABASE_URL") or _read_settings().get("database_url")
    path = urlsplit(str(url or "sqlite:///data/receiver.db"))
    if path.scheme != "sqlite":
        return []
    try:
        # Read only: it makes no file, and waits for no writer.
        uri = f"file:{path.path[1:]}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=0.1)) as connection:
            return [row[0] for row in connection.execute(_RECENT) if row[0]]
    except sqlite3.Error:
        return []
