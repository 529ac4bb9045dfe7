#!/usr/bin/env bash
# After a planned failover (SENTINEL FAILOVER) redis-py's client of a sentinel's primary goes on to write to the old one.
#
# The sentinel names the new primary at once, but tells the old one of its new role only about ten seconds later, and closes
# no connection before. The client asks the sentinel only when it makes a connection. An open one thus gets a confirmation for
# each XADD in these seconds, and all of those entries are gone once the old primary copies the new one. A client that asks
# the sentinel again at times (`connection_pool.get_master_address()` disconnects if the answer has changed) loses few.
#
# Needs redis-server on the PATH. Exits with 0 if it behaves like this, with 1 if it no longer does.
set -euo pipefail
command -v redis-server > /dev/null || { echo "redis-server is not installed" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check redis==8.1.0
cat > "$folder/failover.py" <<'PYTHON'
import asyncio
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import RedisError

WATCHED = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    (folder / name).mkdir()
    command = ["redis-server", *arguments, "--bind", "127.0.0.1", "--dir", str(folder / name)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


async def answers(client: Redis, *words: str) -> object:
    for _ in range(300):
        try:
            return await client.execute_command(*words)
        except (RedisError, OSError):
            await asyncio.sleep(0.05)
    raise SystemExit(f"no answer to {words}")


async def main(folder: Path) -> int:
    first, second, third = (free_port() for _ in range(3))
    plain = ["--save", "", "--repl-diskless-sync-delay", "0"]
    config = folder / "sentinel.conf"
    config.write_text(f"port {third}\nsentinel monitor main 127.0.0.1 {first} 1\n")
    processes = [
        start(folder, "first", "--port", str(first), *plain),
        start(folder, "second", "--port", str(second), "--replicaof", "127.0.0.1", str(first), *plain),
    ]
    old, new = Redis(port=first), Redis(port=second)
    try:
        await answers(new, "PING")
        while (await old.info("replication")).get("slave0", {}).get("state") != "online":
            await asyncio.sleep(0.05)
        processes.append(start(folder, "third", str(config), "--sentinel"))
        sentinel = Redis(port=third)
        client = Sentinel([("127.0.0.1", third)]).master_for("main")
        await answers(client, "XADD", "events", "*", "n", "0")
        await answers(sentinel, "SENTINEL", "FAILOVER", "main")
        confirmed: list[tuple[float, bytes]] = []
        named_at, began = 0.0, time.monotonic()
        while time.monotonic() < began + WATCHED:
            address = await sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
            if not named_at and int(address[1]) == second:
                named_at = time.monotonic()
            try:
                entry = await client.xadd("events", {"n": "1"})
            except (RedisError, OSError):
                continue
            if named_at:
                confirmed.append((time.monotonic() - named_at, entry))
            await asyncio.sleep(0.1)
        kept = {entry for entry, _ in await new.xrange("events")}
        lost = [at for at, entry in confirmed if entry not in kept]
        server = (await new.info("server"))["redis_version"]
        print(f"Python {platform.python_version()}, redis-py {version('redis')}, Redis {server}")
        print(f"confirmed after the sentinel had named the new primary: {len(confirmed)}, of these lost: {len(lost)}")
        if lost:
            print(f"the last one that was lost was confirmed {max(lost):.1f} s after that")
        return 0 if len(lost) > 10 else 1
    finally:
        for process in processes:
            process.kill()
            process.wait()


sys.exit(asyncio.run(main(Path(sys.argv[1]))))
PYTHON
mkdir "$folder/data"
timeout 120 "$folder/venv/bin/python" "$folder/failover.py" "$folder/data"
