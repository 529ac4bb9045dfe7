"""A reload: which settings it takes, and which destinations stay open."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs
from support.events import until

from receiver import masking, process
from receiver.background import running
from receiver.cli import serve
from receiver.destination_settings import ByName
from receiver.destinations import open_destination
from receiver.error_texts import error_text
from receiver.errors import SettingsError
from receiver.lanes.live_destinations import _Open
from receiver.metrics import RELOAD_FAILED
from receiver.process import make_target
from receiver.reload import Reloader, load_again
from receiver.settings import Settings


def write(text: str) -> None:
    """Write receiver.toml."""
    Path("receiver.toml").write_text(text)


def table(name: str, more: str = "") -> str:
    """Return the table of a destination in memory."""
    return f'[[destinations]]\nname = "{name}"\nurl = "memory:"\n{more}\n'


async def test_settings_that_live_for_long_follow_a_reload() -> None:
    """E4: a mapping by name has the destinations of now; other settings stay, and the log names them."""
    write(table("old"))
    settings = Settings.load()
    names = ByName(lambda: settings.all_destinations, lambda each: each.when)
    reloader = Reloader(settings)

    async def are_read() -> bool:
        return len(names) == 2

    async with running(reloader.run(), name="reload"):
        write('keep_alive = 5\nlog_level = "ERROR"\n' + table("old") + table("new", 'when = "received"'))
        with capture_logs() as logs:
            reloader.request()
            await until(are_read)
        assert dict(names) == {"old": "media_stored", "new": "received"}
        assert settings.keep_alive == 75
        (warning,) = [each for each in logs if each["log_level"] == "warning"]
        assert warning["settings"] == ["RECEIVER_KEEP_ALIVE", "RECEIVER_LOG_LEVEL"]


async def test_invalid_settings_change_nothing() -> None:
    """E4: a file that is no TOML, or has an error in any setting, changes nothing until it is corrected."""
    write(table("old"))
    settings = Settings.load()
    reloader = Reloader(settings)

    async def has_failed() -> bool:
        return REGISTRY.get_sample_value("receiver_settings_reload_failed") == 1

    async def has_succeeded() -> bool:
        return not await has_failed()

    async with running(reloader.run(), name="reload"):
        for wrong in ("[[destinations]\n", "keep_alive = -1\n" + table("new"), table("new") + table("new")):
            write(wrong)
            RELOAD_FAILED.set(0)
            with capture_logs() as logs:
                reloader.request()
                await until(has_failed)
            assert logs[0]["event"] == "settings not read again: nothing has changed"
            assert [each.name for each in settings.every_destination] == ["old"]
        write(table("new"))
        reloader.request()
        await until(has_succeeded)
        assert [each.name for each in settings.every_destination] == ["new"]


@pytest.mark.parametrize("error", [SettingsError("wrong"), RecursionError("deep"), ValueError("digits")])
def test_no_error_of_a_reload_ends_the_supervisor(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """E4: after any error the settings for later web processes stay, and the log names the class."""
    write(table("old"))
    settings = Settings.load()

    def fail(_settings: Settings) -> Settings:
        raise error

    monkeypatch.setattr(serve, "load_again", fail)
    with capture_logs() as logs:
        serve._reload(settings, worker=True)
    assert [each.name for each in settings.every_destination] == ["old"]
    assert logs[0]["event"] == "settings not read again: nothing has changed"
    assert logs[0]["error"] == error_text(error)


def test_a_reload_of_the_supervisor_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: the parts that only checked the settings are closed, whether or not one fails to close."""
    closed: list[str] = []

    class Closes:
        def __init__(self, name: str) -> None:
            self.name = name

        async def close(self) -> None:
            closed.append(self.name)
            raise RuntimeError(self.name)

    def make(_url: object, **_options: object) -> Closes:
        return Closes("storage or downloader")

    monkeypatch.setattr(process, "open_storage", make)
    monkeypatch.setattr(process, "Downloader", lambda **_options: make(""))
    monkeypatch.setattr(process, "open_for_work", lambda each: Closes(each.name))
    write(table("old"))
    settings = Settings.load()
    write(table("new") + table("other"))
    serve._reload(settings, worker=True)
    assert [each.name for each in settings.every_destination] == ["new", "other"]
    assert sorted(closed) == ["new", "other", "storage or downloader", "storage or downloader"]


@pytest.mark.parametrize(
    ("more", "stays"),
    [
        ("", True),
        ("concurrency = 3", False),
        ('filter = { model = "m" }', False),
        ('when = "received"', False),
    ],
)
def test_only_a_destination_that_is_the_same_stays_open(more: str, *, stays: bool) -> None:
    """E4: a header that was not known to be secret when it was read first makes no other destination."""
    headers = 'headers = { x-a = "plain-value-01" }'
    text = f'[[destinations]]\nname = "orders"\nurl = "http://127.0.0.1:1/"\n{headers}\n'
    write(text)
    (first,) = Settings.load().destinations
    target = make_target(first, open_destination(first))
    opened = _Open(settings=first, target=target, closing=AsyncExitStack())
    masking.register_secret("plain-value-01")
    write(text + more)
    (again,) = load_again(Settings.load()).destinations
    assert again != first
    assert opened.serves(again) is stays
