"""SIGHUP: the destinations of `receiver.toml` are read again, all or nothing."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from receiver.config_file import variable_name
from receiver.error_texts import error_text
from receiver.errors import SettingsError
from receiver.metrics import RELOAD_FAILED
from receiver.settings import Settings

Replace = Callable[[Settings], Awaitable[object]]
"""Opens and closes the destinations of a worker, and lets the settings take them. Raises SettingsError."""

_SIGNALS: Final = {signal.SIGHUP}

_ends_with_terminal: bool | None = None
"""Whether this process had a terminal when it started. None in a web process: its parent decides."""

log = structlog.get_logger()


def hold_reloads() -> None:
    """Keep a SIGHUP until `accept_reloads`: without a handler it would kill the process.

    Processes that are spawned meanwhile hold theirs, too.
    """
    global _ends_with_terminal  # noqa: PLW0603 - as the mask below, of this process
    if _ends_with_terminal is None:
        # `nohup` lets it go on.
        _ends_with_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def accept_reloads() -> None:
    """Let the handler of SIGHUP get the signal, also one that was held."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def is_hangup() -> bool:
    """Return whether a SIGHUP says that the terminal of this process was closed, which ends the process."""
    return bool(_ends_with_terminal) and not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def load_again(settings: Settings) -> Settings:
    """Read the settings again, as at start. Raises SettingsError."""
    loaded = Settings.load()
    if settings.all_sources:
        loaded.require_sources()
    fields = Settings.model_fields.keys() - {"destinations", "destination_url"}
    changed = [name for name in sorted(fields) if getattr(settings, name) != getattr(loaded, name)]
    if changed:
        log.warning(
            "these settings have changed; they need a restart",
            settings=[variable_name(name) for name in changed],
        )
    return loaded


def log_failed_reload(error: Exception) -> None:
    """Log that a reload has changed nothing, with a traceback if that was not foreseen."""
    log.error(
        "settings not read again: nothing has changed",
        error=error_text(error),
        help="correct receiver.toml (`receiver check`) and send SIGHUP again",
    )
    if not isinstance(error, SettingsError):
        log.error("reload failed unexpectedly", exc_info=error)


class Reloader:
    """Reads the destinations again at each request, one request after the other."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.replace: Replace | None = None
        """Of the worker in this process, if it has one."""
        self._requested = asyncio.Event()

    def request(self) -> None:
        """Reload soon. Several requests during a reload cause one more."""
        self._requested.set()

    async def run(self) -> None:
        """Reload at each request until cancelled."""
        while True:
            await self._requested.wait()
            self._requested.clear()
            try:
                await self._reload()
            except Exception as error:  # noqa: BLE001 - the destinations of before go on
                RELOAD_FAILED.set(1)
                log_failed_reload(error)

    async def _reload(self) -> None:
        loaded = load_again(self._settings)
        if self.replace is None:
            self._settings.take_destinations(loaded)
            done = None
        else:
            done = await self.replace(loaded)
        RELOAD_FAILED.set(0)
        log.info("destinations read again", names=[each.name for each in loaded.every_destination], done=done)
