"""The blocks of docs/backup.md, run as printed on both databases."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.commands import ReceiverProcess, command_environment, run_command
from support.payloads import SECRET, body, signed
from support.servers import Postgres

PAGE = Path(__file__).parents[2] / "docs" / "backup.md"


def blocks(heading: str) -> tuple[str, str]:
    """Return the blocks of a section: the backup and the restore."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    backup, restore = re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return backup, restore


def run(block: str, folder: Path, settings: dict[str, str], programs: Path | None) -> None:
    """Run a block in a folder with the commands of this checkout."""
    environment = command_environment(**settings)
    paths = [
        str(Path(sys.executable).parent),
        *([] if programs is None else [str(programs)]),
        os.environ["PATH"],
    ]
    environment["PATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def send(receiver: ReceiverProcess, *names: str) -> None:
    """Send webhooks."""
    for name in names:
        content = body(name)
        answer = httpx.post(f"{receiver.url}/clipia/webhook", content=content, headers=signed(content))
        assert answer.status_code == 200


@pytest.mark.parametrize("heading", ["PostgreSQL", "SQLite"])
def test_a_backup_is_restored(heading: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """C15: a backup is taken while webhooks arrive; after the restore its events are there, and jobs wait."""
    backup, restore = blocks(heading)
    programs = None
    url = f"sqlite:///{tmp_path / 'data/receiver.db'}"
    server: Postgres | None = None
    if heading == "PostgreSQL":
        server = request.getfixturevalue("postgres")
        programs, url = server.bin, server.url(template="migrated")
    settings = {
        "CLIPIA_WEBHOOK_SECRET": SECRET,
        "RECEIVER_DATABASE_URL": url,
        "RECEIVER_STORAGE_URL": f"file:{tmp_path / 'data/media'}",
    }
    (tmp_path / "data/media").mkdir(parents=True)
    (tmp_path / "data/media/a-file").write_bytes(b"a picture")
    with ReceiverProcess(tmp_path, **settings) as receiver:
        send(receiver, "r-1", "r-2")
        run(backup, tmp_path, settings, programs)
        send(receiver, "r-3")
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o750
    shutil.rmtree(tmp_path / "data")
    if server is not None:
        server.drop(url)
        settings["RECEIVER_DATABASE_URL"] = server.url()
    run(restore, tmp_path, settings, programs)
    listed = run_command("events", "list", "--json", settings=settings, cwd=tmp_path)
    assert {each["request_id"] for each in json.loads(listed.stdout)["data"]} == {"r-1", "r-2"}
    assert (tmp_path / "data/media/a-file").read_bytes() == b"a picture"
    with ReceiverProcess(tmp_path, **settings) as receiver:
        send(receiver, "r-3")
    frozen = run_command("jobs", "thaw", settings=settings, cwd=tmp_path)
    assert frozen.returncode == 0, frozen.stderr
