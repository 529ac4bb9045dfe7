"""`receiver check` and the log."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs
from support.payloads import SECRET
from typer.testing import CliRunner

from receiver.cli import app
from receiver.cli.waiting import find_missing
from receiver.core.lane_names import RETENTION_LANE
from receiver.destination_control import collected_problems
from receiver.status import WorkerStatus


@pytest.fixture(params=["before", "inside"])
def logger(request: pytest.FixtureRequest) -> Iterator[str]:
    """Loggers that keep their processors from their first record on, as the commands configure them."""
    structlog.configure(cache_logger_on_first_use=True)
    yield request.param
    structlog.configure(cache_logger_on_first_use=False)


def test_problems_are_collected_in_the_block_only(logger: str) -> None:
    """Records inside the block are captured, even of loggers that were used before; later records are not."""
    log = structlog.get_logger()
    if logger == "before":
        log.debug("first line")
    with collected_problems() as problems:
        log.warning("odd", problem="no replica")
        log.warning("odd", problem="no replica")
        log.info("something else")
    assert problems == ["no replica"]
    with capture_logs() as logs:
        log.warning("odd", problem="another one")
    assert (problems, len(logs)) == (["no replica"], 1)


def test_the_result_of_check_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`check --json` prints each finding with its level, and its exit status is that of `check`."""
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("RECEIVER_DATABASE_URL", f"sqlite:///{tmp_path / 'receiver.db'}")
    monkeypatch.setenv("RECEIVER_STORAGE_URL", f"file:{tmp_path / 'media'}")
    for url, status, level in (("file:events.jsonl", 0, "ok"), ("file:a-file/events.jsonl", 1, "error")):
        monkeypatch.setenv("RECEIVER_DESTINATION_URL", url)
        Path("a-file").touch()
        result = CliRunner().invoke(app, ["check", "--json"])
        found = {each["step"]: each for each in json.loads(result.stdout)["data"]}
        assert (result.exit_code, found["destination default"]["level"]) == (status, level), found
        assert found["settings"] == {"level": "ok", "step": "settings", "message": "readable"}
        assert found["storage"]["level"] == "ok"


def test_a_database_that_every_user_can_read_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`check` names the files and the command. A stricter mode of the operator is fine, and is kept."""
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", SECRET)
    file = tmp_path / "receiver.db"
    monkeypatch.setenv("RECEIVER_DATABASE_URL", f"sqlite:///{file}")
    monkeypatch.setenv("RECEIVER_STORAGE_URL", f"file:{tmp_path / 'media'}")
    for mode, warned in ((0o644, True), (0o660, False), (0o600, False)):
        file.touch()
        file.chmod(mode)
        result = CliRunner().invoke(app, ["check", "--json"])
        texts = [each["message"] for each in json.loads(result.stdout)["data"] if each["level"] == "warning"]
        assert any(f"chmod o= {file}" in text for text in texts) == warned, texts
        assert file.stat().st_mode & 0o777 == mode


def test_a_worker_without_retention_is_named() -> None:
    """The schedule needs the setting at a worker, not only at the process that checks."""
    worker = WorkerStatus(host="web-1", pid=7, lanes=["media"], running=True, seen_seconds_ago=1.0, live=None)
    assert "RECEIVER_RETENTION_DAYS for the workers" in (find_missing([worker], [RETENTION_LANE]) or "")
    assert find_missing([worker | {"lanes": [RETENTION_LANE]}], [RETENTION_LANE]) is None
