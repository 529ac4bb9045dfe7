"""`receiver submit`, `jobs`, `models`, `estimate` and `account`, against a sandbox and a running receiver."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.commands import ReceiverProcess, command_environment, run_command
from support.payloads import SECRET
from support.servers import end, free_port, wait_for_port

CAT = '{"prompt": "a cat"}'
SEED = '{"prompt": "a cat", "seed": 7}'
IMAGE = "nano-banana-2"


class Clipia:
    """A sandbox in a process of its own."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = {
            "CLIPIA_KEY": "clipia_live_commands",
            "CLIPIA_BASE_URL": self.url,
            "RECEIVER_MEDIA_HOSTS": self.url,
        }
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "receiver",
                "sandbox",
                "--port",
                str(self.port),
                "--no-like-clipia",
                *options,
            ],
            env=command_environment(CLIPIA_WEBHOOK_SECRET=SECRET),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(self.port, self.process)

    def generations(self) -> list[dict[str, Any]]:
        """Return the generations that were submitted."""
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/_sandbox/requests").json()["requests"]
        return found

    def switch(self, **options: Any) -> None:
        """Change the sandbox's options."""
        assert httpx.patch(f"{self.url}/_sandbox/options", json=options).is_success


@pytest.fixture(scope="module")
def clipia() -> Iterator[Clipia]:
    """A sandbox whose generations take a moment, for all tests of the module."""
    sandbox = Clipia("--duration", "0.5")
    yield sandbox
    end(sandbox.process)


@pytest.fixture(autouse=True)
def afresh(clipia: Clipia) -> None:
    """The sandbox, empty at the start of each test."""
    assert httpx.post(f"{clipia.url}/_sandbox/reset").is_success


def receiver(folder: Path, clipia: Clipia, **settings: str) -> ReceiverProcess:
    """Return a receiver that works with the sandbox."""
    return ReceiverProcess(
        folder, **clipia.settings, RECEIVER_DESTINATION_URL=f"file:{folder / 'events.jsonl'}", **settings
    )


def test_a_job_from_the_command_line_to_its_files(clipia: Clipia, tmp_path: Path) -> None:
    """F10: without a public URL `submit --wait` prints the files, and the other commands show the job."""
    running = receiver(tmp_path, clipia)
    with running:

        def command(*arguments: str) -> bytes:
            result = run_command(*arguments, settings=running.settings, cwd=tmp_path)
            assert result.returncode == 0, result.stderr
            return result.stdout

        waited = run_command(
            *("submit", IMAGE, "--input", CAT, "--key", "order-7", "--metadata", "order=7", "--wait"),
            settings=running.settings,
            cwd=tmp_path,
        )
        assert waited.returncode == 0, waited.stderr
        first = waited.stdout.decode().splitlines()
        assert first[0] == "completed, 12 credits charged"
        for uri in re.findall(r"file://(\S+)", waited.stdout.decode()):
            assert Path(uri).stat().st_size > 0
        assert len(first) == 3, "one image in two variants"

        (tmp_path / "cat.json").write_text(CAT)
        again = json.loads(
            command("submit", IMAGE, "-i", "@cat.json", "--key", "order-7", "--metadata", "order=7", "--json")
        )
        assert again["state"] == "completed"
        assert len(clipia.generations()) == 1

        listed = json.loads(
            command("jobs", "list", "--state", "completed", "--metadata", "order=7", "--json")
        )
        assert [job["id"] for job in listed["data"]] == [again["id"]]
        assert listed["data"][0]["caller"] == "cli"
        assert again["id"] in command("jobs", "list").decode()
        assert b"No jobs." in command("jobs", "list", "--metadata", "order=8")
        shown = command("jobs", "show", again["request_id"]).decode()
        for part in (again["id"], "order=7", "by poll", "default: delivered", "image original: file://"):
            assert part in shown
        assert json.loads(command("jobs", "show", again["id"], "--json"))["charged"] == 12
        assert json.loads(command("jobs", "cost", "--by", "model", "--json")) == {
            "data": [{"model": IMAGE, "jobs": 1, "reserved": 0, "charged": 12, "refunded": 0}],
            "next": None,
        }
        assert re.search(r"total +1 +0 +12 +0", command("jobs", "cost", "--by", "caller").decode())
        account = json.loads(command("account", "--json"))
        assert account["usage_30d"]["credits_spent"] == account["ledger_30d"]["charged"] == 12
        assert account["difference_30d"] == 0
        assert "balance:" in command("account").decode()


def test_bad_input_is_an_error_before_it_costs(clipia: Clipia, tmp_path: Path) -> None:
    """F12: bad input and a price above --max-cost are errors, and no job is submitted."""
    settings = clipia.settings | {"RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'receiver.db'}"}

    def rejected(*arguments: str, stdin: bytes | None = None) -> str:
        result = run_command("submit", *arguments, settings=settings, cwd=tmp_path, stdin=stdin)
        assert result.returncode in {1, 2, 4, 5}, result.stdout
        assert b"Traceback" not in result.stderr
        return result.stderr.decode()

    assert 'did you mean "prompt"' in rejected(IMAGE, "-i", '{"promt": "a cat"}')
    assert "no model" in rejected("absent", "-i", CAT)
    assert "max_cost of 11" in rejected(IMAGE, "-i", CAT, "--max-cost", "11")
    assert "not JSON" in rejected(IMAGE, "-i", "@-", stdin=b"{")
    assert "JSON object" in rejected(IMAGE, "-i", "[]")
    assert "cannot be read" in rejected(IMAGE, "-i", "@absent.json")
    assert "NAME=VALUE" in rejected(IMAGE, "-i", CAT, "--metadata", "order")
    assert '"seed" is not known' in rejected(IMAGE, "-i", SEED, "--strict")
    assert clipia.generations() == []


def test_without_a_key_the_message_names_the_setting(tmp_path: Path) -> None:
    """Each command that needs Clipia names the missing setting; `jobs list` works without it."""
    for arguments in (["submit", IMAGE, "-i", CAT], ["models"], ["account"]):
        result = run_command(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert b"CLIPIA_KEY" in result.stderr
    assert run_command("jobs", "list", cwd=tmp_path).returncode == 0


def test_the_catalogue(clipia: Clipia, tmp_path: Path) -> None:
    """Models with both schemas, a text model and an estimate are printed as text and as JSON."""

    def command(*arguments: str) -> str:
        result = run_command(*arguments, settings=clipia.settings, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout.decode()

    listed = command("models")
    assert IMAGE in listed
    assert "suno-music" in listed
    assert "gpt-5.6-sol" in listed
    assert "0.00003 USD per completion token" in command("models", "gpt-5.6-sol")
    assert "prompt: type string, required True" in command("models", IMAGE)
    assert "prompt: type string, required True" in command("models", "suno-music")
    assert json.loads(command("models", IMAGE, "--json"))["slug"] == IMAGE
    found = json.loads(command("models", "--json"))
    assert (found["next"], IMAGE in {model.get("slug") for model in found["data"]}) == (None, True)
    given = '{"prompt": "a cat", "num_images": 2}'
    assert command("estimate", IMAGE, "-i", given) == "24 credits\n"
    assert json.loads(command("estimate", IMAGE, "-i", given, "--json"))["credits"] == 24
    assert command("estimate", IMAGE, "-i", SEED).startswith('12 credits\nwarning: Parameter "seed"')
    strict = run_command("estimate", IMAGE, "-i", SEED, "--strict", settings=clipia.settings, cwd=tmp_path)
    assert (strict.returncode, b"not known" in strict.stderr) == (5, True)


def test_a_job_that_clipia_refuses_for_now(clipia: Clipia, tmp_path: Path) -> None:
    """F6: `submit` prints that Clipia refuses a job, `account` and `check` count these; `cancel` ends one."""
    clipia.switch(credits=20)
    settings = clipia.settings | {"RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'receiver.db'}"}

    def command(*arguments: str) -> tuple[str, str]:
        result = run_command(*arguments, settings=settings, cwd=tmp_path)
        assert b"Traceback" not in result.stderr, result.stderr
        return result.stdout.decode(), result.stderr.decode()

    dear = '{"prompt": "a cat", "num_images": 4}'
    out, told = command("submit", IMAGE, "-i", dear, "--json")
    job = json.loads(out)
    assert job["state"] == "pending"
    assert "Clipia has not accepted it yet (insufficient_credits: " in told
    _, told = command("submit", IMAGE, "-i", SEED)
    assert "it costs 12 credits" in told
    assert 'Warning: Parameter "seed"' in told
    assert "refused for now:     1 job;" in command("account")[0]
    assert "refused by Clipia for now (402, 403): 1;" in command("check")[0]
    assert "open jobs that need" not in command("check")[0]
    assert command("jobs", "cancel", job["id"], "--yes")[0] == f"Job {job['id']} is canceled.\n"
    assert "refused for now" not in command("account")[0]
    clipia.switch(refuse_submits="invalid_api_key")
    command("submit", IMAGE, "-i", CAT)
    for name in ("account", "check"):
        assert "Clipia refuses the account (invalid_api_key: " in command(name)[0]
    # Jobs that need a key of the other kind, or any key.
    for key, wanted in (("clipia_test_other", "a key of the other kind"), ("", "CLIPIA_KEY")):
        settings["CLIPIA_KEY"] = key
        assert f"open jobs that need {wanted}" in command("check")[0]


def test_a_job_that_fails_and_is_submitted_again(clipia: Clipia, tmp_path: Path) -> None:
    """A failed generation is exit status 1; `jobs resubmit` asks first, and pays for another one."""
    clipia.switch(fail_rate=1)
    running = receiver(tmp_path, clipia)
    with running:
        failed = run_command(
            "submit", IMAGE, "-i", CAT, "--wait", "--json", settings=running.settings, cwd=tmp_path
        )
        assert failed.returncode == 1
        job = json.loads(failed.stdout)
        assert (job["state"], job["charged"]) == ("failed", 0)
        clipia.switch(fail_rate=0)
        resubmit = ("jobs", "resubmit", job["id"])
        asked = run_command(*resubmit, settings=running.settings, cwd=tmp_path, stdin=b"n\n")
        assert asked.returncode == 1
        assert b"pay for it again" in asked.stdout + asked.stderr
        assert len(clipia.generations()) == 1
        done = run_command(*resubmit, "--yes", settings=running.settings, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        deadline = time.monotonic() + 30
        while True:
            shown = run_command("jobs", "show", job["id"], "--json", settings=running.settings, cwd=tmp_path)
            again = json.loads(shown.stdout)
            if again["state"] == "completed":
                break
            assert time.monotonic() < deadline, again
        assert "resubmitted" in [attempt["outcome"] for attempt in again["attempts"]]
        rejected = run_command(*resubmit, "--yes", settings=running.settings, cwd=tmp_path)
        assert rejected.returncode == 5
        assert b"the job is completed" in rejected.stderr
    keys = [generation["idempotency_key"] for generation in clipia.generations()]
    assert len(set(keys)) == 2
    missing = run_command("jobs", "show", "absent", settings=running.settings, cwd=tmp_path)
    assert missing.returncode == 4
    assert b"no job" in missing.stderr


def test_waiting_on_a_terminal_shows_progress_and_ctrl_c_leaves_the_job(
    clipia: Clipia, tmp_path: Path
) -> None:
    """While a worker runs the job, the terminal shows progress; Ctrl-C ends the wait, and not the job."""
    clipia.switch(duration=600)
    ours, theirs = pty.openpty()
    with receiver(tmp_path, clipia) as running:
        process = subprocess.Popen(
            [sys.executable, "-m", "receiver", "submit", IMAGE, "-i", CAT, "--wait"],
            env=command_environment(**running.settings, TERM="xterm", COLUMNS="200"),
            cwd=tmp_path,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        # Longer than GRACE_SECONDS, as a worker is running.
        output = read_until(ours, rb"submitted[^,]*, 1[5-9] s")
        process.send_signal(signal.SIGINT)
        output += read_until(ours, rb"The job goes on")
        assert process.wait(30) != 0
    os.close(ours)
    assert b"Traceback" not in output
    assert b"worker" not in output
    assert [generation["status"] for generation in clipia.generations()] != ["COMPLETED"]


def test_a_wait_ends_if_no_worker_is_running(clipia: Clipia, tmp_path: Path) -> None:
    """F10: in each state of the job the command says which process to start, and exits with 3."""
    settings = clipia.settings | {"RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'receiver.db'}"}
    submit = ("submit", IMAGE, "-i", CAT, "--wait")
    for extra in ({}, {"RECEIVER_PUBLIC_URL": "http://127.0.0.1:9"}):
        result = run_command(*submit, settings=settings | extra, cwd=tmp_path)
        printed = " ".join(result.stderr.decode().split())
        assert result.returncode == 3, printed
        assert "start `receiver serve` or `receiver worker`" in printed
        assert result.stdout == b"submitted\n"
    away = settings | {"CLIPIA_BASE_URL": "http://127.0.0.1:9"}
    result = run_command(*submit, "--json", settings=away, cwd=tmp_path)
    assert (result.returncode, json.loads(result.stdout)["state"]) == (3, "pending")
    assert b"no worker is running on this database" in result.stderr


def test_a_wait_ends_if_the_worker_has_no_key(clipia: Clipia, tmp_path: Path) -> None:
    """F10: a worker without CLIPIA_KEY cannot poll the result: the command says so and exits with 3."""
    without = {name: value for name, value in clipia.settings.items() if name != "CLIPIA_KEY"}
    running = ReceiverProcess(tmp_path, **without)
    with running:
        submit = ("submit", IMAGE, "-i", CAT, "--wait")
        settings = running.settings | {"CLIPIA_KEY": clipia.settings["CLIPIA_KEY"]}
        # It says so at its first look, long before it gives up.
        short = run_command(*submit, "--timeout", "0.1", settings=settings, cwd=tmp_path)
        printed = " ".join(short.stderr.decode().split())
        assert short.returncode == 124, printed
        assert "Nothing continues this job now: process" in printed
        result = run_command(*submit, settings=settings, cwd=tmp_path)
        assert running.process is not None
        printed = " ".join(result.stderr.decode().split())
        assert (result.returncode, result.stdout) == (3, b"submitted\n"), printed
        assert f"process {running.process.pid} on " in printed
        assert "restart it with CLIPIA_KEY" in printed
        checked = run_command("check", settings=running.settings, cwd=tmp_path)
        assert f"process {running.process.pid} on ".encode() in checked.stdout
        assert b"CLIPIA_KEY" in checked.stdout


def test_a_wait_ends_if_the_worker_has_a_key_of_another_kind(clipia: Clipia, tmp_path: Path) -> None:
    """F10: a worker with a test key does not poll jobs of a live key, and the command says so."""
    running = ReceiverProcess(tmp_path, **(clipia.settings | {"CLIPIA_KEY": "clipia_test_commands"}))
    with running:
        result = run_command(
            *("submit", IMAGE, "-i", CAT, "--wait"), settings=running.settings | clipia.settings, cwd=tmp_path
        )
    printed = " ".join(result.stderr.decode().split())
    assert result.returncode == 3, printed
    assert "a CLIPIA_KEY that is not a live key" in printed


def test_a_wait_has_a_time_limit(clipia: Clipia, tmp_path: Path) -> None:
    """--timeout ends the wait with status 124 and prints the job; the job goes on."""
    clipia.switch(duration=15)
    with receiver(tmp_path, clipia) as running:
        submit = ("submit", IMAGE, "-i", CAT, "--key", "k", "--json")
        result = run_command(*submit, "--wait", "--timeout", "1", settings=running.settings, cwd=tmp_path)
        assert result.returncode == 124, result.stderr
        assert json.loads(result.stdout)["state"] == "submitted"
        assert b"--timeout are over" in result.stderr
        done = run_command(*submit, "--wait", "--timeout", "90", settings=running.settings, cwd=tmp_path)
        assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "completed"), done.stderr
    assert len(clipia.generations()) == 1
    unclear = run_command(*submit, "--timeout", "1", settings=running.settings, cwd=tmp_path)
    assert unclear.returncode == 2
    assert b"--timeout needs --wait" in unclear.stderr


def test_the_lanes_that_run_are_shown(clipia: Clipia, tmp_path: Path) -> None:
    """`check` lists each running process with its lanes and the time when it was last seen."""
    running = receiver(tmp_path, clipia)
    with running:
        assert running.process is not None
        line = rf"process {running.process.pid} on \S+, seen \d+ s ago: (.*)"
        (lanes,) = re.findall(line, printed_by_check(running))
        assert set(lanes.split(", ")) == {
            *("fanout", "media", "replay", "submit", "poll", "destination:default")
        }
        running.kill()
        assert f"process {running.process.pid}" in printed_by_check(running)
        running.start()
        running.stop()
        running.start()
    checked = printed_by_check(running)
    assert checked.count("process ") == 1, "only the killed process leaves its row"


def printed_by_check(running: ReceiverProcess) -> str:
    """Return what `receiver check` prints."""
    result = run_command("check", settings=running.settings, cwd=running.folder)
    assert result.returncode == 0, result.stdout
    return result.stdout.decode()


def test_jobs_belong_to_the_caller_of_the_option(clipia: Clipia, tmp_path: Path) -> None:
    """F8: with --caller the key belongs to that caller: a repeat with the same key is the same job."""
    settings = clipia.settings | {"RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'receiver.db'}"}

    def submit(*arguments: str) -> dict[str, Any]:
        command = ("submit", IMAGE, "-i", CAT, "--key", "k", "--json", *arguments)
        result = run_command(*command, settings=settings, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        job: dict[str, Any] = json.loads(result.stdout)
        return job

    shop, own = submit("--caller", "shop"), submit()
    assert (shop["caller"], own["caller"]) == ("shop", "cli")
    assert submit("--caller", "shop")["id"] == shop["id"] != own["id"] == submit()["id"]
    assert len(clipia.generations()) == 2
    rejected = run_command(*("submit", IMAGE, "-i", CAT, "--caller", "a\nb"), settings=settings, cwd=tmp_path)
    assert rejected.returncode in {2, 5}
    assert b"caller" in rejected.stderr


def read_until(terminal: int, wanted: bytes, *, seconds: float = 90) -> bytes:
    """Read a terminal until it has printed the text."""
    output = b""
    deadline = time.monotonic() + seconds
    while not re.search(wanted, output):
        assert time.monotonic() < deadline, output
        output += os.read(terminal, 4096)
    return output
