"""Attacks on the memory of a real receiver, at a size that every machine can carry.

`benchmarks/memory.py` runs them at full size.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from support import attacks
from support.attacks import Flood, Genuine, Meter, genuine_webhooks
from support.commands import ReceiverProcess, run_command
from support.servers import Postgres

BUDGET = 8
"""MiB for unfinished requests."""
CONNECTIONS = 300
ADDED = 45.0
"""MiB that an attack may add. Without the budget it adds 80 or more, in proportion to the connections."""
REMAINING = 25.0
REST = 60.0
UNTIL_ANSWERED = 8.0
ATTACKS_ON_THE_CPU = {"unfinished bodies in chunks of 2 bytes", "pipelined requests"}
"""These attacks cost more time than memory: on a slow machine an authentic webhook may be late or rejected.

Clipia sends it again, and then it must be stored.
"""


@contextmanager
def serving(folder: Path, url: str) -> Iterator[ReceiverProcess]:
    """Run a web process with a small budget."""
    assert run_command("migrate", settings={"RECEIVER_DATABASE_URL": url}).returncode == 0
    process = ReceiverProcess(
        folder,
        *("serve", "--port", "0", "--no-worker"),
        RECEIVER_DATABASE_URL=url,
        RECEIVER_MAX_BUFFERED_BYTES=str(BUDGET * attacks.MIB),
    )
    process.measured = False
    with process:
        yield process


async def attack(
    process: ReceiverProcess, name: str, *, frozen: Postgres | None = None
) -> tuple[Meter, Flood, Genuine]:
    """Attack a process for a while; return the memory that it cost."""
    assert process.process is not None
    port = int(process.url.rpartition(":")[2])
    async with genuine_webhooks(port) as warm:
        await attacks.flood(port, "idle connections", connections=5, seconds=1.5)
    assert warm.statuses == {b"200": warm.sent}
    meter = Meter(process.process.pid)
    with attacks.frozen_postgres(frozen) if frozen else nullcontext():
        async with meter.watching(), genuine_webhooks(port, repeat=name in ATTACKS_ON_THE_CPU) as genuine:
            done = await attacks.flood(
                port,
                name,
                connections=CONNECTIONS,
                seconds=30 if frozen else 4,
                total=2 * CONNECTIONS if frozen else None,
            )
    return meter, done, genuine


@pytest.mark.parametrize("name", [name for name in attacks.ATTACKS if name != attacks.SIGNED])
async def test_clients_without_a_secret_stay_within_the_memory_budget(tmp_path: Path, name: str) -> None:
    """A10: an attack adds no more than the budget, its memory is freed, and authentic webhooks are stored."""
    with serving(tmp_path, f"sqlite:///{tmp_path / 'receiver.db'}") as process:
        meter, _, genuine = await attack(process, name)
        assert meter.peak < ADDED
        assert await meter.wait_until(below=REMAINING, seconds=REST) < REMAINING
        assert genuine.statuses == {b"200": genuine.sent}


async def test_a_frozen_database_does_not_fill_the_memory(tmp_path: Path) -> None:
    """C4: if signed bodies cannot be stored, they are answered 503 in time and stay within the budget."""
    with Postgres() as postgres, serving(tmp_path, postgres.url()) as process:
        meter, done, _ = await attack(process, attacks.SIGNED, frozen=postgres)
        assert meter.peak < ADDED
        # A slow machine may not have sent them all, and a client that is still sending may get a reset.
        assert set(done.answers) <= {b"503", b"408", b""}
        assert done.answers[b"503"] > CONNECTIONS / 2
        assert await meter.wait_until(below=REMAINING, seconds=REST) < REMAINING
        async with genuine_webhooks(int(process.url.rpartition(":")[2])) as genuine:
            await attacks.flood(
                int(process.url.rpartition(":")[2]), "idle connections", connections=1, seconds=1
            )
        assert genuine.statuses[b"200"] > 0


async def test_a_slow_body_and_a_frozen_database_are_one_deadline(tmp_path: Path) -> None:
    """C4: a body that takes 2.5 s and a database that never answers: 503 within 8 s of the first byte."""
    with Postgres() as postgres, serving(tmp_path, postgres.url()) as process:
        port = int(process.url.rpartition(":")[2])
        with attacks.frozen_postgres(postgres):
            status, seconds = await attacks.slow_webhook(port, pause=2.5)
        assert status == b"503"
        assert seconds < UNTIL_ANSWERED
