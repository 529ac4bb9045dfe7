"""The modes of the receiver's files, and the output of its commands into a pipe."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ReceiverProcess, command_environment, run_command
from support.payloads import SECRET

import receiver.cli


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo that ran with a umask that opens files to all users."""
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run(
        [sys.executable, "-m", "receiver", "demo", "--dir", str(folder)],
        env=command_environment(),
        umask=0,
        capture_output=True,
        timeout=120,
        check=True,
    )
    return folder


def modes(folder: Path) -> dict[str, str]:
    """Return the mode of every file in a folder, in octal digits."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): f"{path.stat().st_mode & 0o777:o}" for path in files}


def test_files_are_for_their_user_and_group(demo: Path) -> None:
    """Prompts, raw bodies, media, messages and logs: other users cannot read them, even if the umask is 0."""
    found = modes(demo)
    assert {"receiver.db", "events.jsonl", "receiver.log"} <= found.keys()
    assert [name for name in found if name.startswith("media/")]
    assert set(found.values()) == {"640"}, found
    folders = [path for path in demo.rglob("*") if path.is_dir()]
    assert folders
    assert {f"{path.stat().st_mode & 0o777:o}" for path in folders} == {"750"}


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_files_beside_a_database_in_use_are_too(tmp_path: Path, umask: int) -> None:
    """SQLite's -wal file holds raw bodies just as the database does. A backup of the group can read all."""
    before = os.umask(umask)
    try:
        with ReceiverProcess(tmp_path, RECEIVER_DATABASE_URL=f"sqlite:///{tmp_path / 'data/receiver.db'}"):
            found = modes(tmp_path / "data")
    finally:
        os.umask(before)
    assert found == dict.fromkeys(("receiver.db", "receiver.db-shm", "receiver.db-wal"), "640")
    assert f"{(tmp_path / 'data').stat().st_mode & 0o777:o}" == "750"


def test_an_export_is_too_and_pipes_get_no_progress_bars(demo: Path, tmp_path: Path) -> None:
    """A cron job mails the result alone: one line per command."""
    settings = {
        "CLIPIA_WEBHOOK_SECRET": SECRET,
        "RECEIVER_DATABASE_URL": f"sqlite:///{demo / 'receiver.db'}",
        "RECEIVER_STORAGE_URL": f"file:{demo / 'media'}",
        "RECEIVER_DESTINATION_URL": f"file:{tmp_path / 'again.jsonl'}",
    }
    export = tmp_path / "export.jsonl"
    with ReceiverProcess(tmp_path, **settings):
        commands = {
            ("replay", "--status", "OK", "--wait"): None,
            ("media", "verify"): r"\d+ intact, 0 damaged\n",
            ("events", "export", str(export)): r"3 events, .* exported\n",
            ("events", "import", str(export)): r"3 .*\n",
            ("prune", "--older-than", "90d"): r"0 events .*\n",
        }
        for command, printed in commands.items():
            done = run_command(*command, settings=settings)
            assert done.returncode == 0, done.stderr
            output = (done.stdout + done.stderr).decode()
            assert "━" not in output
            assert "\r" not in output
            assert "\x1b" not in output
            if printed is not None:
                assert re.fullmatch(printed, output), output
    assert f"{export.stat().st_mode & 0o777:o}" == "640"


def test_progress_is_shown_by_one_helper() -> None:
    """If a progress bar is made without the helper, it would print into pipes."""
    folder = Path(receiver.cli.__file__).parent
    makers = [path.name for path in folder.glob("*.py") if re.search(r"\bProgress\(", path.read_text())]
    assert makers == ["terminal.py"]
