"""The commands, run as processes."""

import http.server
import json
import re
import signal
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.commands import ReceiverProcess, run_command, shown_login, wait_for_lines
from support.payloads import SECRET, body, signed
from support.servers import Postgres, free_port
from typer.testing import CliRunner

from receiver.cli import app

COMMANDS = [
    *("demo", "serve", "worker", "sandbox", "migrate", "check", "send", "events"),
    *("submit", "jobs", "models", "estimate", "account"),
    *("replay", "replays", "deliveries", "route", "media", "prune"),
]
GROUPS = [
    *("events list", "events show", "events export", "events import", "events recover"),
    *("jobs list", "jobs show", "jobs resubmit", "jobs cost"),
    *(
        "replays list",
        "replays show",
        "replays cancel",
        "deliveries list",
        "deliveries retry",
        "deliveries move",
        "deliveries discard",
        "media verify",
        "media give-up",
    ),
]


@pytest.mark.parametrize("command", ["", *COMMANDS, *GROUPS])
def test_every_command_has_help(command: str) -> None:
    """`--help` works everywhere and needs no settings."""
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_help_lists_every_command() -> None:
    """`receiver --help` names all commands; `--version` prints the version."""
    output = run_command("--help").stdout.decode()
    assert [command for command in COMMANDS if command not in output] == []
    assert run_command("--version").stdout.strip()


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    """The demo ends with status 0, its files exist, and with `--keep` it prints a login of its dashboard."""
    result = run_command("demo", "--dir", str(tmp_path / "demo"), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = wait_for_lines(tmp_path / "demo" / "events.jsonl", 3)
    assert {line["type"] for line in lines} == {"ai.clipia.generation.completed"}
    stored = {path.suffix for path in (tmp_path / "demo" / "media").rglob("*") if path.is_file()}
    assert stored == {".png", ".webp", ".mp4", ".mp3"}
    again = ("demo", "--dir", str(tmp_path / "demo"), "--keep")
    with shown_login(*again, cwd=tmp_path) as (dashboard, token, process):
        assert len(wait_for_lines(tmp_path / "demo" / "events.jsonl", 6)) == 6
        own_page = {"sec-fetch-site": "same-origin"}
        login = httpx.post(f"{dashboard}/login", data={"token": token}, headers=own_page)
        assert login.status_code == 303
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 130


def test_serve_without_a_secret_says_what_to_set(tmp_path: Path) -> None:
    """A1: without a webhook secret the service does not start; the message names the variable."""
    result = run_command("serve", cwd=tmp_path)
    assert result.returncode == 2
    assert b"CLIPIA_WEBHOOK_SECRET" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("settings", "printed"),
    [
        ({"RECEIVER_DATABASE_URL": "mysql://x"}, "RECEIVER_DATABASE_URL"),
        ({"RECEIVER_DATABASE_URL": "sqlite://"}, "in-memory"),
        ({"RECEIVER_DATABASE_URL": "postgresql://u:canary-pw@127.0.0.1:1/x"}, "database is unavailable"),
        ({"RECEIVER_DESTINATION_URL": "gopher://canary-pw@x"}, "use one of file:"),
        ({"RECEIVER_STORAGE_URL": "ftp://canary-pw@x"}, "RECEIVER_STORAGE_URL"),
        ({"RECEIVER_MEDIA_HOSTS": "not a host"}, "RECEIVER_MEDIA_HOSTS"),
        ({"RECEIVER_CONFIG": "absent.toml"}, "absent.toml"),
    ],
)
def test_wrong_settings_are_one_clear_error(tmp_path: Path, settings: dict[str, str], printed: str) -> None:
    """G8: serve, worker and check exit with an error that names the setting, and shows no password."""
    for command in ("serve", "worker", "check"):
        result = run_command(command, settings={"CLIPIA_WEBHOOK_SECRET": SECRET, **settings}, cwd=tmp_path)
        output = (result.stdout + result.stderr).decode()
        assert result.returncode in {1, 2, 6}, output
        assert printed in output
        assert "Traceback" not in output
        assert "canary-pw" not in output


def test_several_web_processes_need_postgresql(tmp_path: Path) -> None:
    """With SQLite a second web process is an error that gives the reason."""
    result = run_command("serve", "--workers", "2", settings={"CLIPIA_WEBHOOK_SECRET": SECRET}, cwd=tmp_path)
    assert result.returncode == 2
    assert b"PostgreSQL" in result.stderr


def test_check_finds_a_working_configuration(tmp_path: Path) -> None:
    """`receiver check` finds no error, and warns of settings that are for development."""
    settings = {
        "CLIPIA_WEBHOOK_SECRET": SECRET,
        "RECEIVER_DESTINATION_URL": "file:events.jsonl",
        "RECEIVER_MEDIA_HOSTS": "media.clipia.ai,http://127.0.0.1:9000",
        "RECEIVER_PUBLIC_URL": "https://hooks.example.com/",
        "RECEIVER_DATABSE_URL": "typo",
    }
    (tmp_path / "receiver.toml").write_text(
        '[[destinations]]\nname = "slow"\nurl = "file:slow.jsonl"\nrate = 0.5\nconcurrency = 2\ntimeout = 3\n'
    )
    output = ""
    for _ in range(2):  # before and after the database has its tables
        result = run_command("check", settings=settings, cwd=tmp_path)
        output = result.stdout.decode()
        assert result.returncode == 0, output
        assert "https://hooks.example.com/clipia/webhook" in output
        assert "http://127.0.0.1:9000" in output
        assert "RECEIVER_DATABSE_URL" in output
        assert run_command("migrate", settings=settings, cwd=tmp_path).returncode == 0
    assert "writable" in output
    assert "gets every event, when media_stored" in output
    assert (
        "destination slow: reachable; gets every event, when media_stored; 2 at once, 0.5 per second, "
        "3 s per attempt" in output
    )


def test_check_finds_deliveries_without_a_destination(tmp_path: Path) -> None:
    """`check` warns if deliveries wait for a destination that was renamed or removed."""
    settings = {"RECEIVER_DESTINATION_URL": f"http://127.0.0.1:{free_port()}/"}
    with ReceiverProcess(tmp_path, **settings) as receiver:
        content = body("r-1", payload={"model": "m", "output": {}})
        httpx.post(f"{receiver.url}/clipia/webhook", content=content, headers=signed(content), verify=False)
        deadline = time.monotonic() + 20
        while not [r for r in receiver.records() if r["event"] == "not delivered"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    del receiver.settings["RECEIVER_DESTINATION_URL"]
    result = run_command("check", settings=receiver.settings, cwd=tmp_path)
    assert b"1 delivery to 'default', a destination that is not configured" in result.stdout


def test_a_renamed_destination_gets_the_waiting_deliveries(tmp_path: Path) -> None:
    """After a destination is renamed, the log warns at start, and `deliveries move` moves its deliveries."""

    def write(name: str, url: str) -> None:
        (tmp_path / "receiver.toml").write_text(f'[[destinations]]\nname = "{name}"\nurl = "{url}"\n')

    def command(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return run_command("deliveries", *arguments, settings=receiver.settings, cwd=tmp_path)

    write("old", f"http://127.0.0.1:{free_port()}/")
    with ReceiverProcess(tmp_path) as receiver:
        for number in range(2):
            content = body(f"r-{number}", payload={"model": "m", "output": {}})
            callback = f"{receiver.url}/clipia/webhook"
            httpx.post(callback, content=content, headers=signed(content), verify=False)
        wait_for_records(receiver, "not delivered", 2)
    write("new", "file:events.jsonl")
    with receiver:
        (told,) = wait_for_records(receiver, "deliveries wait for a destination that is not configured", 1)
        assert (told["level"], told["destination"], told["count"]) == ("warning", "old", 2)
        assert b"configured: new" in command("move", "old", "newer").stderr
        assert b"'new' is configured" in command("discard", "new").stderr
        assert json.loads(command("move", "old", "new", "--dry-run", "--json").stdout) == {
            "moved": 2,
            "discarded": 0,
            "under_way": 0,
        }
        assert command("discard", "old", "--dry-run").stdout == b"2 would be discarded\n"
        assert command("move", "old", "new").stdout == b"2 moved\n"
        assert len(wait_for_lines(tmp_path / "events.jsonl", 2)) == 2
        with sqlite3.connect(tmp_path / "receiver.db") as connection:
            connection.execute("UPDATE deliveries SET state = 'dead', destination = 'older'")
        connection.close()
        retried = command("retry", "--destination", "older")
        assert (retried.returncode, b"'older' is not configured" in retried.stderr) == (0, True)
        with sqlite3.connect(tmp_path / "receiver.db") as connection:
            connection.execute(
                "UPDATE deliveries SET state = 'pending', destination = 'killed', lease = '0', "
                "next_attempt_at = strftime('%Y-%m-%d %H:%M:%f000', 'now', '+50 seconds')"
            )
        connection.close()
        for arguments in (
            ("discard", "killed"),
            ("discard", "killed", "--dry-run"),
            ("move", "killed", "new"),
        ):
            left = command(*arguments)
            assert (left.returncode, left.stdout) == (1, b""), "claimed deliveries are left"
            note = b" ".join(left.stderr.split())
            assert re.fullmatch(
                rb"2 deliveries to 'killed' under way: .* Run this command again in [1-5]?[0-9] s\.",
                note,
            ), note
        again = command("discard", "old")
        assert (again.returncode, again.stderr) == (1, b"There is no delivery to 'old' to move or discard.\n")


def wait_for_records(receiver: ReceiverProcess, event: str, count: int) -> list[dict[str, object]]:
    """Wait until the log has this many records of an event."""
    deadline = time.monotonic() + 30
    while len(found := [record for record in receiver.records() if record["event"] == event]) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_check_warns_of_a_wrong_url(tmp_path: Path) -> None:
    """If a destination's server answers 404, `check` warns and does not call it reachable."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Lost) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/events"
        result = run_command("check", settings={"RECEIVER_DESTINATION_URL": url}, cwd=tmp_path)
        server.shutdown()
    [line] = [line for line in result.stdout.decode().splitlines() if "destination default" in line]
    assert line.startswith("warning")
    assert "answers 404 to OPTIONS" in line
    assert "reachable" not in line
    assert "problem=" not in result.stdout.decode(), "the problem is in the log, too"


class Lost(http.server.BaseHTTPRequestHandler):
    """A server without any path."""

    def do_OPTIONS(self) -> None:
        """Answer 404."""
        self.send_error(404)

    def log_message(self, *_args: object) -> None:
        """Keep silent."""


def test_check_finds_errors(tmp_path: Path) -> None:
    """`receiver check` goes through all steps, and exits with 1 if one fails."""
    (tmp_path / "blocked").write_text("a file where a folder should be")
    result = run_command(
        "check",
        settings={
            "RECEIVER_STORAGE_URL": "file:blocked/media",
            "RECEIVER_DESTINATION_URL": f"http://127.0.0.1:{free_port()}/",
        },
        cwd=tmp_path,
    )
    output = result.stdout.decode()
    assert result.returncode == 1
    for part in ("webhook secret", "storage", "destination default"):
        assert [line for line in output.splitlines() if "error" in line and part in line], output


def test_send_and_events(tmp_path: Path) -> None:
    """A payload of `send` is accepted once, and `events` shows the event as text and as JSON."""
    payload = tmp_path / "payload.json"
    payload.write_bytes(body("r-1", payload={"model": "m", "output": {}, "cost": 2}))
    with ReceiverProcess(tmp_path, RECEIVER_DESTINATION_URL="file:events.jsonl") as receiver:
        callback = f"{receiver.url}/clipia/webhook"

        def command(*arguments: str, stdin: bytes | None = None) -> str:
            result = run_command(*arguments, settings=receiver.settings, cwd=tmp_path, stdin=stdin)
            assert result.returncode == 0, result.stdout + result.stderr
            return result.stdout.decode()

        assert '"accepted"' in command("send", str(payload), "--url", callback)
        assert '"duplicate"' in command("send", "-", "--url", callback, stdin=payload.read_bytes())
        assert '"unrecognized"' in command("send", "-", "--url", callback, stdin=b"\xff strange [bold]")
        stale = run_command(
            "send", str(payload), "--url", callback, "--age", "400", settings=receiver.settings
        )
        assert stale.returncode == 1
        assert b"401" in stale.stdout
        wait_for_lines(tmp_path / "events.jsonl", 1)
        time.sleep(0.5)
        newest, oldest = json.loads(command("events", "list", "--json"))["data"]
        assert (newest["state"], oldest["state"]) == ("unrecognized", "ready")
        assert oldest["deliveries"] == {"delivered": 1}
        assert "r-1" in command("events", "list")
        assert json.loads(
            command("events", "list", "--json", "--state", "ready", "--status", "OK", "--model", "m")
        )["data"]
        assert command("events", "list", "--source", "absent").strip() == "No events."
        assert "No events" in command("events", "list", "--until", "2020-01-01")
        page = json.loads(command("events", "list", "--json", "--limit", "1"))
        assert [row["id"] for row in page["data"]] == [newest["id"]]
        rest = json.loads(command("events", "list", "--json", "--before", page["next"]))
        assert ([row["id"] for row in rest["data"]], rest["next"]) == ([oldest["id"]], None)
        for key in ("r-1", oldest["id"]):
            shown = json.loads(command("events", "show", key, "--json"))
            assert [receipt["outcome"] for receipt in shown["receipts"]] == ["accepted", "duplicate"]
            assert shown["body"]["request_id"] == "r-1"
            (delivery,) = shown["deliveries"]
            assert [attempt["outcome"] for attempt in delivery["attempt_log"]] == ["succeeded"]
        assert "delivered" in command("events", "show", "r-1")
        assert "body_base64" in json.loads(command("events", "show", newest["id"], "--json"))
        missing = run_command("events", "show", "absent", settings=receiver.settings, cwd=tmp_path)
        assert missing.returncode == 4
        assert b"no event" in missing.stderr
    nobody = run_command("send", str(payload), "--url", callback, settings=receiver.settings)
    assert nobody.returncode == 6
    assert b"did not answer" in nobody.stderr
    absent = run_command("send", str(tmp_path / "absent"), settings=receiver.settings)
    assert absent.returncode == 1
    assert b"cannot be read" in absent.stderr
    source = run_command("send", str(payload), "--source", "absent", settings=receiver.settings)
    assert source.returncode == 2


def test_the_listeners_can_be_separate(tmp_path: Path) -> None:
    """G2: the public listener has the callback and the health paths, the internal one everything else."""
    paths = ("/clipia/webhook", "/clipia/webhook/", "/readyz", "/metrics", "/v1/jobs")
    halves = {"webhook": (405, 405, 200, 404, 404), "internal": (404, 404, 200, 200, 401)}
    for half, expected in halves.items():
        arguments = ("serve", "--port", "0", "--no-worker", "--only", half)
        with ReceiverProcess(tmp_path, *arguments) as receiver:
            answers = [httpx.get(receiver.url + path, verify=False).status_code for path in paths]
            assert answers == [*expected]
            documents = 200 if half == "internal" else 404
            pages = 303 if half == "internal" else 404
            for path, status in (("/docs", documents), ("/openapi.json", documents), ("/dashboard", pages)):
                assert httpx.get(receiver.url + path, verify=False).status_code == status


def test_metrics_need_a_token_once_there_is_one(tmp_path: Path) -> None:
    """G1: metrics are open without tokens, and need the scope `read` if there are tokens."""
    tokens = "grafana:0123456789abcdef:read,jobs:fedcba9876543210:submit"
    with ReceiverProcess(tmp_path, RECEIVER_API_TOKENS=tokens) as receiver:

        def get(token: str | None) -> httpx.Response:
            headers = {"Authorization": token} if token else {}
            return httpx.get(f"{receiver.url}/metrics", headers=headers, verify=False)

        assert get(None).status_code == 401
        assert get("Bearer wrong").status_code == 401
        assert get("Basic 0123456789abcdef").status_code == 401
        assert get("Bearer fedcba9876543210").status_code == 403
        response = get("Bearer 0123456789abcdef")
        assert response.status_code == 200
        assert 'receiver_backlog{lane="fanout"}' in response.text
        assert 'receiver_backlog{lane="media"}' in response.text


def test_the_production_split_shares_the_work(postgres: Postgres, tmp_path: Path) -> None:
    """`serve --no-worker --workers 2` receives, two `worker` processes forward; SIGTERM drains them all."""
    settings = {
        "RECEIVER_DATABASE_URL": postgres.url(template="migrated"),
        "RECEIVER_DESTINATION_URL": f"file:{tmp_path / 'events.jsonl'}",
    }
    arguments = ("serve", "--port", "0", "--no-worker", "--workers", "2", "--metrics-port", "0")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with (
        ReceiverProcess(tmp_path, *arguments, **settings) as web,
        ReceiverProcess(first, "worker", **settings) as one,
        ReceiverProcess(second, "worker", **settings) as two,
    ):
        with httpx.Client(transport=httpx.HTTPTransport(retries=20)) as client:
            for number in range(120):
                content = body(f"r-{number}", payload={"model": "m", "output": {}, "cost": 1})
                response = client.post(f"{web.url}/clipia/webhook", content=content, headers=signed(content))
                assert response.status_code == 200
        lines = wait_for_lines(tmp_path / "events.jsonl", 120)
        # Each process counts its own, and the listener that they share cannot speak for both.
        addresses = [str(record["url"]) for record in web.records() if record["event"] == "metrics"]
        assert len(addresses) == 2
        accepted = r'receiver_webhooks_total\{outcome="accepted",source="clipia"\} (\S+)'
        found = [re.findall(accepted, httpx.get(each, verify=False).text) for each in addresses]
        assert sum(float(number) for (number,) in found) == 120
        assert httpx.get(f"{web.url}/metrics", verify=False).status_code == 404
        assert [worker.stop() for worker in (one, two)] == [0, 0]
        assert web.stop() == 0
    assert sorted(str(line["subject"]) for line in lines) == sorted(f"r-{number}" for number in range(120))


def test_all_records_are_written_before_the_end(tmp_path: Path) -> None:
    """G10: records are written in groups after a moment, and none is lost at the end of the process."""
    receiver = ReceiverProcess(tmp_path).start()
    content = body("r-last")
    answer = httpx.post(f"{receiver.url}/clipia/webhook", content=content, headers=signed(content))
    assert answer.status_code == 200
    receiver.stop()
    assert {"webhooks stored", "worker stopped"} <= {str(record["event"]) for record in receiver.records()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """E16: on a signal the process ends with its own status, without traceback and without a lost record."""
    receiver = ReceiverProcess(tmp_path).start()
    assert receiver.process is not None
    receiver.signal(number)
    receiver.process.wait(20)
    assert b"Traceback" not in receiver.log.read_bytes()
    assert receiver.records()[-1]["event"]


def test_logs_are_json_lines_without_secrets(tmp_path: Path) -> None:
    """G7, G8: the log has one JSON object per line for any payload, and no secret, signature or body."""
    canary = "canary-0123456789abcdef"
    settings = {
        "CLIPIA_WEBHOOK_SECRET": f"whsec_{canary}",
        "RECEIVER_API_TOKENS": f"ops:{canary}",
        "RECEIVER_DESTINATION_URL": f"http://127.0.0.1:{free_port()}/?token={canary}",
    }
    with ReceiverProcess(tmp_path, **settings) as receiver:
        content = body("r-1", payload={"model": f"m\r\nFAKE \x1b[31m {canary}", "output": {}})
        headers = signed(content, secret=f"whsec_{canary}") | {"X-Clipia-Webhook-Id": "[31mFAKE"}
        with httpx.Client(verify=False) as client:
            assert client.post(f"{receiver.url}/clipia/webhook", content=content, headers=headers).is_success
            headers["X-Clipia-Signature"] = f"t=1,v1={canary}"
            rejected = client.post(f"{receiver.url}/clipia/webhook", content=content, headers=headers)
            assert rejected.status_code == 401
            deadline = time.monotonic() + 20
            while not [r for r in receiver.records() if r["event"] == "not delivered"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            metrics = client.get(f"{receiver.url}/metrics", headers={"Authorization": f"Bearer {canary}"})
            assert metrics.is_success
    log = receiver.log.read_text()
    assert canary not in log + metrics.text
    assert "\x1b" not in log
    assert headers["X-Clipia-Signature"] not in log
    assert {"webhooks stored", "webhook rejected"} <= {str(record["event"]) for record in receiver.records()}
