"""The examples of docs/jobs.md, run as printed except for their ports."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.commands import command_environment
from support.servers import end, free_port, require

DOCUMENT = Path(__file__).parents[2] / "docs" / "jobs.md"


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


class Example:
    """The servers of the first block, and the environment that it exports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sandbox, self.receiver = free_port(), free_port()
        setup = self.ported(blocks("sh")[0])
        exported = re.findall(r"(\w+)=(\S+)", "\n".join(re.findall(r"^export (.*)", setup, re.MULTILINE)))
        self.environment = command_environment(**dict(exported))
        started = [
            ["sandbox", "--port", str(self.sandbox), "--duration", "0.2"],
            ["serve", "--port", str(self.receiver)],
        ]
        assert [each[0] for each in started] == re.findall(r"^receiver (\w+) &", setup, re.MULTILINE)
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "receiver", *arguments],
                env=self.environment,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for arguments in started
        ]
        self._wait_until_ready()

    def ported(self, text: str) -> str:
        """Return an example with the ports of this test."""
        return text.replace("127.0.0.1:9000", f"127.0.0.1:{self.sandbox}").replace(
            "127.0.0.1:8000", f"127.0.0.1:{self.receiver}"
        )

    def run(self, *command: str) -> str:
        """Run an example to its end and return its output."""
        result = subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        for url in (
            f"http://127.0.0.1:{self.sandbox}/_sandbox/options",
            f"http://127.0.0.1:{self.receiver}/readyz",
        ):
            while True:
                try:
                    if httpx.get(url).is_success:
                        break
                except httpx.TransportError:
                    pass
                assert time.monotonic() < deadline, url
                time.sleep(0.05)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    """The services and variables that the examples need."""
    running = Example(tmp_path_factory.mktemp("example"))
    yield running
    for process in running.processes:
        end(process)


def test_curl_and_the_command_line_submit_one_job(example: Example) -> None:
    """F8: curl, curl again and the command are one caller with one key: one job, paid for once."""
    require("curl")
    _setup, curl, command = blocks("sh")
    job = json.loads(example.run("bash", "-c", example.ported(curl)))
    assert (job["state"], job["caller"], job["metadata"]) == ("completed", "shop", {"order": "4711"})
    assert [file["state"] for file in job["event"]["media"]] == ["stored", "stored"]
    assert json.loads(example.run("bash", "-c", example.ported(curl)))["id"] == job["id"]
    program = f"{sys.executable} -m receiver"
    output = example.run("bash", "-c", command.replace("receiver", program, 1))
    assert output.startswith("completed, 12 credits charged")
    listed = json.loads(example.run(*program.split(), "jobs", "list", "--json"))["data"]
    assert [each["id"] for each in listed if each["metadata"] == {"order": "4711"}] == [job["id"]]
    keys = [each["idempotency_key"] for each in listed]
    assert len(keys) == len(set(keys)), "an example uses the key of another caller's example"
    generations = httpx.get(f"http://127.0.0.1:{example.sandbox}/_sandbox/requests").json()["requests"]
    assert len(generations) == len(listed)


@pytest.mark.parametrize("document", ["README.md", "docs/jobs.md"])
def test_no_two_callers_of_the_examples_have_one_key(document: str) -> None:
    """F8: if a reader copies all examples, each is paid for once: every key belongs to one caller."""
    text = (DOCUMENT.parents[1] / document).read_text(encoding="utf-8")
    callers: dict[str, set[str]] = {}
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        named = re.search(r"""(?:--caller |caller=")([\w-]+)""", block)
        for key in re.findall(r"""(?:--key |Idempotency-Key: |idempotency_key=")([\w/.-]+)""", block):
            default = "shop" if "curl" in block else "local" if language == "python" else "cli"
            callers.setdefault(key, set()).add(named[1] if named else default)
    assert callers
    assert {key: found for key, found in callers.items() if len(found) > 1} == {}


def test_the_python_examples_run(example: Example) -> None:
    """Both submitters work in a process of their own, beside the receiver."""
    asynchronous, synchronous = blocks("python")
    printed = example.run(sys.executable, "-c", asynchronous)
    assert re.fullmatch(r"completed 12 \['file://\S+', 'file://\S+'\]\n", printed)
    assert example.run(sys.executable, "-c", synchronous) == "completed\n"
