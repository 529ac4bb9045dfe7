"""`receiver demo`: three jobs from submission to the forwarded message, on this machine."""

import asyncio
import hashlib
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import unquote, urlsplit

import httpx
import orjson
import typer

from receiver.cli.remote import local_only
from receiver.cli.terminal import print_line, size, stdout
from receiver.db import reads
from receiver.db.database import Database
from receiver.db.views import EventDetails, File
from receiver.errors import ReceiverError
from receiver.logs import configure_logging
from receiver.private_files import open_private
from receiver.sandbox import SandboxOptions, create_app, running

JOBS: Final = (
    ("image", "nano-banana-2", {"prompt": "a sunset over mountains"}),
    ("video", "seedance-2-fast-t2v", {"prompt": "waves on a beach", "duration": 4}),
    ("audio", "suno-music", {"prompt": "a calm piano"}),
)
_LISTS: Final = ("jobs", "events")
TIMEOUT_SECONDS: Final = 60.0
"""For the whole demo."""


@local_only("it runs a receiver of its own")
def demo(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", help="Folder for the database, the media and the messages. Default: a new one."
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the processes running until Ctrl-C.")] = False,
) -> None:
    """Run a sandbox and a receiver, and watch three jobs from submission to the forwarded message.

    Needs no Clipia account and costs nothing. The exit status is 0 if every step succeeded.
    """
    folder = _make_folder(directory)
    configure_logging(level="WARNING")
    try:
        asyncio.run(_Demo(folder).run(keep=keep))
    except KeyboardInterrupt:
        stdout.print("Stopped.")
        raise typer.Exit(130) from None


def _make_folder(directory: Path | None) -> Path:
    try:
        folder = (directory or Path(tempfile.mkdtemp(prefix="clipia-demo-"))).resolve()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReceiverError(
            f"no folder for the demo: {error.strerror}; name one that this user can write to with --dir"
        ) from None
    return folder


class _Demo:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._messages = folder / "events.jsonl"
        self._began = time.monotonic()
        self._printed: set[tuple[str, ...]] = set()
        self._token = secrets.token_urlsafe(24)
        self._port = _free_port()

    async def run(self, *, keep: bool) -> None:
        secret = f"whsec_{secrets.token_urlsafe(24)}"
        app = create_app(SandboxOptions(duration=1.5), secret=secret)
        async with running(app) as clipia:
            self._print(f"Sandbox (a local Clipia) on {clipia}")
            environment = self._environment(clipia, secret)
            async with self._receiver(environment) as receiver:
                self._print(f"Receiver with its worker on {receiver}")
                kinds = await self._submit(receiver)
                await self._watch(kinds, environment["RECEIVER_DATABASE_URL"])
                self._print_results(environment["RECEIVER_DATABASE_URL"])
                if keep:
                    self._print("Everything keeps running: press Ctrl-C to stop.")
                    print_line(
                        f"          dashboard: {receiver}/dashboard\n          token:     {self._token}"
                    )
                    await asyncio.Event().wait()

    def _environment(self, clipia: str, secret: str) -> dict[str, str]:
        config = self._folder / "receiver.toml"
        with open(config, "w", encoding="utf-8", opener=open_private) as file:
            file.write(f'[[destinations]]\nname = "demo"\nurl = "file:{self._messages}"\n')
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("RECEIVER_", "CLIPIA_"))
        }
        return inherited | {
            "CLIPIA_BASE_URL": clipia,
            "CLIPIA_KEY": f"clipia_live_{secrets.token_hex(16)}",
            "CLIPIA_WEBHOOK_SECRET": secret,
            "RECEIVER_API_TOKENS": f"demo:{self._token}",
            "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{self._port}",
            "RECEIVER_CONFIG": str(config),
            "RECEIVER_DATABASE_URL": f"sqlite:///{self._folder / 'receiver.db'}",
            "RECEIVER_STORAGE_URL": f"file:{self._folder / 'media'}",
            "RECEIVER_MEDIA_HOSTS": clipia,
            "RECEIVER_DRAIN": "0",
        }

    @asynccontextmanager
    async def _receiver(self, environment: dict[str, str]) -> AsyncIterator[str]:
        log_file = self._folder / "receiver.log"
        with os.fdopen(
            open_private(str(log_file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC), "wb"
        ) as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "receiver", "serve", "--port", str(self._port)),
                env=environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        try:
            yield await self._address(process, log_file)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()

    async def _address(self, process: asyncio.subprocess.Process, log_file: Path) -> str:
        """Wait until the receiver is ready, and return its base URL from its log."""
        async with httpx.AsyncClient(trust_env=False) as client:
            while time.monotonic() - self._began < TIMEOUT_SECONDS:
                if process.returncode is not None:
                    raise ReceiverError(f"the receiver did not start; its log is {log_file}")
                url = _listening_url(log_file)
                if url and (await client.get(f"{url}/readyz")).is_success:
                    return url
                await asyncio.sleep(0.05)
        raise ReceiverError(
            f"the receiver was not ready after {TIMEOUT_SECONDS:.0f} s; its log is {log_file}"
        )

    async def _submit(self, receiver: str) -> dict[str, str]:
        """Submit the jobs to the receiver's API; return the kind of each `request_id`."""
        kinds = {}
        headers = {"Authorization": f"Bearer {self._token}"}
        async with httpx.AsyncClient(base_url=receiver, headers=headers, trust_env=False) as client:
            for kind, model, parameters in JOBS:
                # A random part, so that another run in the same folder submits new jobs.
                key = {"Idempotency-Key": f"{kind}-{secrets.token_hex(4)}"}
                answer = await client.post(
                    "/v1/jobs", json={"model": model, "input": parameters}, headers=key
                )
                job = answer.json()
                if answer.status_code != httpx.codes.CREATED:
                    raise ReceiverError(f"the receiver rejected the {kind} job: {answer.text}")
                kinds[job["request_id"]] = kind
                self._print(f"{kind}: job {job['id']} submitted to {model}, {job['cost']} credits")
        return kinds

    async def _watch(self, kinds: dict[str, str], database_url: str) -> None:
        database = Database(database_url)
        try:
            while time.monotonic() - self._began < TIMEOUT_SECONDS:
                done = True
                for request_id, kind in kinds.items():
                    async with database.read() as connection:
                        event = await reads.show_event(connection, request_id)
                    done &= event is not None and self._report(kind, event)
                if done:
                    return
                await asyncio.sleep(0.1)
        finally:
            await database.close()
        raise ReceiverError(
            f"the demo was not complete after {TIMEOUT_SECONDS:.0f} s; see {self._folder / 'receiver.log'}"
        )

    def _report(self, kind: str, event: EventDetails) -> bool:
        """Print the new steps of an event; return whether all its steps have succeeded."""
        key = str(event["id"])
        self._print_once((key,), f"{kind}: webhook verified, event {key} stored once")
        for file in event["media"]:
            if file["state"] == "stored" and file["size"] is not None and file["sha256"] is not None:
                _verify(file)
                self._print_once(
                    (key, str(file["id"])),
                    f"{kind}: {file['variant']} stored, {size(file['size'])} of {file['content_type']}, "
                    f"sha256 {file['sha256'][:16]}…",
                )
        for delivery in event["deliveries"]:
            if delivery["state"] == "delivered":
                _find_message(self._messages, key)
                self._print_once((key, "forwarded"), f"{kind}: message forwarded to {self._messages.name}")
        return _all_in(event["media"], "stored") and _all_in(event["deliveries"], "delivered")

    def _print_results(self, database_url: str) -> None:
        self._print("Done: three jobs, every file saved, every message forwarded. The results:")
        for name, value in (
            ("messages", self._messages),
            ("media", self._folder / "media"),
            ("log", self._folder / "receiver.log"),
            *((name, f"RECEIVER_DATABASE_URL={database_url} {_program()} {name} list") for name in _LISTS),
        ):
            print_line(f"          {name + ':':<10}{value}")

    def _print_once(self, key: tuple[str, ...], message: str) -> None:
        if key not in self._printed:
            self._printed.add(key)
            self._print(message)

    def _print(self, message: str) -> None:
        print_line(f"{time.monotonic() - self._began:6.1f} s  {message}")


def _free_port() -> int:
    """Return a free port: the callback's URL has to be known before the receiver starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listening_url(log_file: Path) -> str | None:
    """Return the URL from the receiver's log; None until it listens."""
    *lines, _unfinished = log_file.read_bytes().split(b"\n")
    records = (orjson.loads(line) for line in lines)
    return next((record["url"] for record in records if record["event"] == "listening"), None)


def _all_in(works: Iterable[Mapping[str, Any]], state: str) -> bool:
    states = [work["state"] for work in works]
    return bool(states) and all(each == state for each in states)


def _verify(file: File) -> None:
    """Read a stored file and compare it with the checksum on record. Raises ReceiverError."""
    path = Path(unquote(urlsplit(file["uri"] or "").path))
    if hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
        raise ReceiverError(f"{path} does not have the checksum on record")


def _find_message(messages: Path, event_id: str) -> None:
    for line in messages.read_bytes().splitlines():
        if orjson.loads(line)["id"] == event_id:
            return
    raise ReceiverError(f"{messages} has no message of event {event_id}")


def _program() -> str:
    """Return the command with which this program was started."""
    return sys.argv[0] if Path(sys.argv[0]).name == "receiver" else f"{sys.executable} -m receiver"
