"""The free space of disks. A disk that hangs, such as a network mount without a server, keeps one thread."""

import asyncio
import shutil
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Final

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.db.database import Database
from receiver.media import local_folder
from receiver.settings import Settings

LEAST_FREE_SHARE: Final = 0.05
"""A disk with less free space is a problem."""
ANSWER_SECONDS: Final = 2.0

_readings: Final[dict[Path, "Future[Reading]"]] = {}
"""The last reading of each folder. While it hangs no other one begins: each would take a thread for good."""


class DiskStatus(TypedDict):
    """The file system of a folder."""

    holds: str
    """`media`, or `database` for SQLite's file."""
    path: str
    free_bytes: int | None
    """null if the disk does not answer."""
    total_bytes: int | None


Reading = tuple[Path, int, int]
"""The resolved folder, the free bytes and all bytes."""


async def read_disks(settings: Settings, database: Database) -> list[DiskStatus]:
    """Return the disks of the folders of media and of SQLite on this machine."""
    folders: dict[str, Path] = {}
    media = local_folder(settings.storage_url.get_secret_value())
    if media is not None:
        folders["media"] = media.absolute()
    if database.file is not None:
        folders["database"] = database.file.parent.absolute()
    return list(await asyncio.gather(*(_read(holds, folder) for holds, folder in folders.items())))


def free_share(disk: DiskStatus) -> float | None:
    """Return the free share of a disk; None if the disk does not answer."""
    free, total = disk["free_bytes"], disk["total_bytes"]
    return free / total if free is not None and total else None


async def _read(holds: str, folder: Path) -> DiskStatus:
    reading = _readings.get(folder)
    if reading is None or reading.done():
        reading = _readings[folder] = Future()
        # Without this a caller that gives up would cancel the reading for all.
        reading.set_running_or_notify_cancel()
        # No executor: the interpreter would wait for its thread at exit.
        try:
            Thread(target=_measure, args=(folder, reading), name="disk", daemon=True).start()
        except RuntimeError as error:  # no thread is left
            reading.set_exception(OSError(type(error).__name__))
    try:
        path, free, total = await asyncio.wait_for(asyncio.wrap_future(reading), ANSWER_SECONDS)
    except OSError:  # or TimeoutError, which is one
        return DiskStatus(holds=holds, path=str(folder), free_bytes=None, total_bytes=None)
    return DiskStatus(holds=holds, path=str(path), free_bytes=free, total_bytes=total)


def _measure(folder: Path, reading: "Future[Reading]") -> None:
    try:
        path = folder.resolve()
        # The first file makes the folder.
        existing = next(each for each in (path, *path.parents) if each.exists())
        usage = shutil.disk_usage(existing)
    except Exception as error:  # noqa: BLE001 - raised in the caller
        reading.set_exception(error)
    else:
        reading.set_result((path, usage.free, usage.total))
