"""The first steps of the README, and the consumer in Node of docs/getting-started.md, as they are printed."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.commands import always, command_environment, run_command, shown_login
from support.servers import end, free_port, missing

ROOT = Path(__file__).parents[2]
PORTS = ("9000", "8000", "8090")
SECONDS = 60.0


def blocks(page: str, heading: str) -> list[tuple[str, str]]:
    """Return the languages and the texts of the blocks below a heading."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    section = re.split(r"^#{1,3} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```(\w+)\n(.*?)^```", section.partition("<details>")[0], re.DOTALL | re.MULTILINE)


class Machine:
    """The folder of a new user, with other ports than those that are printed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {printed: free_port() for printed in PORTS}

    def ported(self, text: str) -> str:
        """Return a text with the ports of this test."""
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda port: str(self.ports[port[1]]), text)

    def write(self, name: str, text: str) -> None:
        """Save a block."""
        (self.folder / name).write_text(self.ported(text), encoding="utf-8")

    @contextmanager
    def running(self, *command: str) -> Iterator[Path]:
        """Run a program in the folder; yield the file of its output."""
        output = self.folder / f"{len(list(self.folder.iterdir()))}.log"
        with output.open("wb") as log:
            process = subprocess.Popen(
                command,
                env=command_environment(RECEIVER_DRAIN="0"),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        with always(lambda: end(process, seconds=45)):
            yield output

    def wait_until_ready(self) -> None:
        """Wait for the receiver, whose worker starts before it listens."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.ports['8000']}/readyz").is_success:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def submit(self, block: str, *, key: str) -> None:
        """Run a block with one `receiver submit`, under a key."""
        program, arguments = block.split(" ", 1)
        assert program == "receiver"
        command = f"{sys.executable} -m receiver {arguments}".replace("order-4711/hero", key)
        done = subprocess.run(
            ["bash", "-c", command],
            env=command_environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("completed, 12 credits charged")


def wait_for_message(output: Path) -> str:
    """Return what a consumer has printed about its first message."""
    deadline = time.monotonic() + SECONDS
    while "ai.clipia.generation.completed" not in output.read_text() or "]" not in output.read_text():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    return output.read_text()


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The blocks of the README's first steps."""
    return blocks("README.md", "## First steps")


def test_the_first_steps_end_with_a_message_in_a_program_of_the_user(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    """A new user gets the README's message in Python and in Node, and the dashboard with one more command."""
    languages = [language for language, _ in steps]
    assert languages == ["sh", "toml", "python", "sh", "sh", "sh"]
    _install, settings, consumer, start, submit, dashboard = (text for _, text in steps)
    (node,) = (
        text
        for language, text in blocks("docs/getting-started.md", "### The consumer in Node")
        if language == "js"
    )
    assert start == "receiver sandbox & receiver serve & python3 consumer.py &\n"
    assert dashboard.startswith("receiver dashboard ")
    machine = Machine(tmp_path)
    machine.write("receiver.toml", settings)
    machine.write("consumer.py", consumer)
    machine.write("consumer.mjs", node)
    ours = (sys.executable, "-m", "receiver")
    sandbox = machine.running(*ours, "sandbox", "--port", str(machine.ports["9000"]), "--duration", "0.2")
    with sandbox, machine.running(*ours, "serve", "--port", str(machine.ports["8000"])):
        machine.wait_until_ready()
        with machine.running(sys.executable, "consumer.py") as output:
            machine.submit(submit, key="order-4711/hero")
            assert "file:///" in wait_for_message(output)
        if shutil.which("node") is None:
            missing("node", "apt-get install nodejs")
        with machine.running("node", "consumer.mjs") as output:
            machine.submit(submit, key="order-4711/other")
            assert "file:///" in wait_for_message(output)
        payload = blocks("docs/getting-started.md", "### A payload of your own")[0][1]
        machine.write("payload.json", payload)
        url = f"http://127.0.0.1:{machine.ports['8000']}/clipia/webhook"
        sent = run_command("send", "payload.json", "--url", url, cwd=tmp_path)
        assert json.loads(sent.stdout.partition(b" ")[2])["status"] == "accepted"
        with shown_login("dashboard", "--port", "0", cwd=tmp_path) as (address, token, _):
            login = httpx.post(
                f"{address}/login", data={"token": token}, headers={"sec-fetch-site": "same-origin"}
            )
            cookie = login.headers["set-cookie"].partition(";")[0]
            page = httpx.get(f"{address}/events", headers={"cookie": cookie}).text
            assert json.loads(payload)["request_id"] in page
