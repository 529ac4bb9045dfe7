"""Helpers of the benchmarks: signed requests, wrk, the CPU time of processes, and servers to compare."""

import contextlib
import hmac
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.commands import command_environment, run_command
from support.payloads import SECRET
from support.servers import end, free_port, wait_for_port

HERE = Path(__file__).parent
MEMORY = Path("/dev/shm")
PATH = "/clipia/webhook"
BODY_BYTES = 600
STARTED = 30.0
"""Seconds that a server may take to answer."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of a load; times are in milliseconds."""

    rate: float
    acked: int
    failed: int
    p50: float
    p95: float
    p99: float
    longest: float
    client_cpu: float
    """Of one core."""
    server_cpu: float
    """Of one core, with the database's processes."""
    other_cpu: float
    """Of one core: the processes that belong neither to the client nor to the servers."""


def signed_request(content: bytes) -> bytes:
    """Return a whole HTTP request that delivers a body, signed now."""
    timestamp = str(int(time.time())).encode()
    signature = hmac.digest(SECRET.encode(), timestamp + b"." + content, "sha256").hex().encode()
    head = (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"X-Clipia-Signature: t=%b,v1=%b\r\nX-Clipia-Timestamp: %b\r\nX-Clipia-Webhook-Id: %b\r\n"
        b"Content-Length: %d\r\n\r\n"
    )
    fields = (PATH.encode(), timestamp, signature, timestamp, str(uuid.uuid4()).encode(), len(content))
    return head % fields + content


def result(request_id: str) -> bytes:
    """Return the body of a finished generation without files, `BODY_BYTES` long."""
    value = {
        "request_id": request_id,
        "status": "OK",
        "payload": {"model": "nano-banana-2", "output": {"text": ""}, "cost": 12},
    }
    bare = json.dumps(value, separators=(",", ":")).encode()
    return bare.replace(b'"text":""', b'"text":"%b"' % (b"x" * (BODY_BYTES - len(bare))))


def write_requests(file: Path, count: int) -> int:
    """Write signed requests of different events to a file; return the size of each."""
    name, size = str(uuid.uuid4()), 0
    head, _, tail = result(name).partition(name.encode())
    with file.open("wb") as target:
        for _ in range(count):
            whole = signed_request(head + str(uuid.uuid4()).encode() + tail)
            size = len(whole)
            target.write(whole)
        # Hundreds of megabytes: the kernel would write them to the disk during the measurement.
        target.flush()
        os.fsync(target.fileno())
    return size


def busy_seconds() -> float:
    """Return the CPU time that all processes of the machine have used."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Return the CPU time that processes have used, and those of their children that have ended."""
    total = 0.0
    for process in processes:
        # If a process has ended since it was listed, its time is among its parent's children.
        with contextlib.suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return a process and those that it started."""
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def run_wrk(
    port: int,
    folder: Path,
    *,
    connections: int,
    seconds: float,
    most: float,
    servers: Callable[[], Sequence[psutil.Process]],
) -> Measured:
    """Load a server; each request is sent once, and `most` is an upper bound of the rate.

    The requests are written to memory if there is a file system in it, or else to `folder`.

    `servers` lists the processes whose CPU time counts, before the load and after it: some start meanwhile.
    """
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")
    file = (MEMORY if MEMORY.is_dir() else folder) / f"requests-{os.getpid()}"
    size = write_requests(file, round(most * seconds) + connections)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "30s"]
    command += ["-s", str(HERE / "load.lua")]
    command += [f"http://127.0.0.1:{port}{PATH}", "--", str(file), str(size)]
    before, used, busy = cpu_seconds(servers()), resource.getrusage(resource.RUSAGE_CHILDREN), busy_seconds()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        file.unlink()
    busy = busy_seconds() - busy
    after, now = cpu_seconds(servers()), resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(done.stderr.strip().splitlines()[-1])
    if "requests" not in told:
        sys.exit(f"wrk did not finish: {done.stderr or done.stdout}")
    took = told["microseconds"] / 1e6
    client = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return Measured(
        rate=told["requests"] / took,
        acked=told["requests"],
        failed=told["failed"],
        p50=told["p50"] / 1e3,
        p95=told["p95"] / 1e3,
        p99=told["p99"] / 1e3,
        longest=told["max"] / 1e3,
        client_cpu=client / took,
        server_cpu=(after - before) / took,
        other_cpu=max(0.0, busy - client - (after - before)) / took,
    )


@contextmanager
def served(
    folder: Path, *arguments: str, program: str = sys.executable, settings: dict[str, str] | None = None
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a server with the option `--port` for the block; yield its port and its process."""
    port = free_port()
    environment = (
        dict(os.environ) | {"CLIPIA_WEBHOOK_SECRET": SECRET, "RECEIVER_DRAIN": "0"} | (settings or {})
    )
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [program, *arguments, "--port", str(port)],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=log,
        )
        try:
            wait_for_port(port, process, seconds=STARTED)
            time.sleep(1)
            yield port, process
        finally:
            process.send_signal(signal.SIGTERM)
            end(process)


def forwarding(folder: Path, database: str) -> dict[str, str]:
    """Migrate a database, and return the settings of a receiver on it that forwards to `events.jsonl`."""
    settings = {
        "RECEIVER_DATABASE_URL": database,
        "RECEIVER_STORAGE_URL": f"file:{folder / 'media'}",
        "RECEIVER_DESTINATION_URL": f"file:{folder / 'events.jsonl'}",
        "CLIPIA_WEBHOOK_SECRET": SECRET,
    }
    if run_command("migrate", settings=settings).returncode:
        sys.exit("the database could not be migrated")
    (folder / "events.jsonl").touch()
    return settings


@contextmanager
def working(folder: Path, settings: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker for the block."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "receiver", "worker"],
        env=command_environment(**settings),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(2)
        yield worker
    finally:
        end(worker)
