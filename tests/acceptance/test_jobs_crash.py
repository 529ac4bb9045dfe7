"""kill -9 and cut answers at every step of a submission: each job is generated once, and ends."""

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import update
from support.commands import ReceiverProcess, always
from support.jobs import (
    Answer,
    Call,
    Caller,
    Link,
    Proxy,
    Sandbox,
    assert_paid_once,
    end_leases,
    forwarded,
    job_receiver,
    run,
    wait_until_done,
    wait_until_none,
)
from support.servers import Postgres

from receiver.db.database import Database
from receiver.db.tables import accounts

JOBS = 9
"""Jobs of a round, submitted in parallel."""
HELD = 4
"""Calls at the same step when the receiver is killed: its first in-flight limit allows that many."""
CUTS = 100
RANDOM_KILLS = 4
CLIENTS = 8


@dataclass(frozen=True)
class Round:
    """The step of the kill, the seconds after it, and the number of kills in a row."""

    step: str
    after: float = 0.0
    kills: int = 1


ROUNDS = {
    "sqlite": (
        Round("catalogue"),
        Round("before"),
        Round("half"),
        Round("sent"),
        Round("answered"),
        Round("torn"),
        Round("delivered"),
        Round("delivered", 0.05),
        Round("delivered", 0.12),
        Round("uncommitted", 0.1),
        Round("before", kills=2),
        Round("sent", kills=2),
        Round("torn", kills=2),
        Round("uncommitted", 0.1, kills=2),
    ),
    "postgresql": (
        Round("catalogue"),
        Round("before"),
        Round("half"),
        Round("sent"),
        Round("answered"),
        Round("torn"),
        Round("delivered"),
        Round("delivered", 0.05),
        Round("uncommitted", 0.1, kills=2),
    ),
}
UNSENT = ("before", "half")
"""Steps before which no call has arrived."""
UNRECORDED = ("sent", "answered", "torn", "uncommitted")
"""Steps after which all calls have arrived and no answer is on record."""


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox that repeats webhooks soon: a killed receiver misses some."""
    with Sandbox(tmp_path, duration=0.05, webhook_backoff=0.5) as running:
        yield running


@pytest.fixture
def proxy(sandbox: Sandbox) -> Iterator[Proxy]:
    """A proxy between the receiver and the sandbox."""
    with Proxy(sandbox) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def receiver(
    request: pytest.FixtureRequest, tmp_path: Path, sandbox: Sandbox, proxy: Proxy
) -> Iterator[ReceiverProcess]:
    """A receiver that the test may kill, on either kind of database."""
    settings = {"RECEIVER_POLL_AFTER": "2"}
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        settings["RECEIVER_DATABASE_URL"] = server.url(template="migrated")
    made = job_receiver(tmp_path / "receiver", sandbox, api=proxy.url, **settings)
    made.measured = False
    with made:
        yield made


def test_kills_at_every_step_pay_for_no_job_twice(
    request: pytest.FixtureRequest, receiver: ReceiverProcess, sandbox: Sandbox, proxy: Proxy
) -> None:
    """F1, T18: kill -9 at each step from the intent to the recorded answer: one generation per job."""
    rounds = ROUNDS[request.node.callspec.params["receiver"]]
    # A webhook would end a job before its submission is repeated, which this test is about.
    sandbox.change(webhook_loss_rate=1)
    acks = Acks()
    struck: dict[str, list[Call]] = {}
    early: list[str] = []
    with Caller(receiver.url) as caller, ThreadPoolExecutor(1) as pool:
        for number, each in enumerate(rounds):
            keys = [f"{number}-{each.step}-{job}" for job in range(JOBS)]
            proxy.handle_call = strike = Strike(each, receiver)
            submitting = pool.submit(caller.submit_all, keys, at_once=JOBS)
            for kill in range(each.kills):
                if kill:
                    proxy.handle_call = strike = Strike(each, receiver)
                    # The submit lane resumes jobs before the process listens, so the kill may come first.
                    receiver.launch()
                struck.setdefault(each.step, []).extend(strike.wait())
                end_leases(receiver.settings["RECEIVER_DATABASE_URL"])
            proxy.handle_call = Link.relay
            receiver.start()
            acks.note(submitting.result())
            early += [key for key in keys if not acks.missing([key])]
            # The database alone has to suffice; only then do the callers without an answer call again.
            wait_until_none(receiver.settings["RECEIVER_DATABASE_URL"], "pending")
            acks.note(caller.submit_all(acks.missing(keys), at_once=JOBS))
    submissions = assert_each_generated_once(receiver, sandbox, acks, jobs=len(rounds) * JOBS)
    assert len(early) >= len(rounds), "too few callers were acked before a kill"
    assert {step: len(calls) for step, calls in struck.items()} == calls_held(rounds)
    assert {submissions[key] for step in UNSENT for key in keys_of(struck[step])} == {1}
    assert min(submissions[key] for step in UNRECORDED for key in keys_of(struck[step])) > 1


def test_kills_at_random_moments_pay_for_no_job_twice(
    request: pytest.FixtureRequest, receiver: ReceiverProcess, sandbox: Sandbox
) -> None:
    """F1, F11: kill -9 at random moments of a burst, with webhooks; callers repeat unanswered calls."""
    url = receiver.settings["RECEIVER_DATABASE_URL"]
    chance = random.Random(request.node.name)
    acks = Acks()
    stop = threading.Event()

    def submit(client: int) -> None:
        with Caller(receiver.url) as caller:
            for number in itertools.count():
                key = f"{client}-{number}"
                while acks.missing([key]) and not stop.is_set():
                    acks.note({key: caller.submit(key)})
                if stop.wait(0.1):
                    return

    with ThreadPoolExecutor(CLIENTS) as pool, always(stop.set):
        clients = [pool.submit(submit, client) for client in range(CLIENTS)]
        for _ in range(RANDOM_KILLS):
            acks.wait_for(CLIENTS)
            time.sleep(chance.uniform(0, 0.4))
            receiver.kill()
            end_leases(url)
            receiver.start()
        stop.set()
        for client in clients:
            client.result()
    assert_each_generated_once(receiver, sandbox, acks, jobs=len(acks.ids))


@pytest.mark.parametrize("receiver", ["sqlite"], indirect=True)
def test_answers_cut_at_any_byte_pay_for_no_job_twice(
    receiver: ReceiverProcess, sandbox: Sandbox, proxy: Proxy
) -> None:
    """F5, T18: answers cut after n bytes, from none to all but one: the same key, and no second job."""
    sandbox.change(webhook_loss_rate=1)
    cut = Cut()
    proxy.handle_call = cut
    acks = Acks()
    with Caller(receiver.url) as caller:
        acks.note(caller.submit_all(map(str, range(CUTS)), at_once=CLIENTS))
    submissions = assert_each_generated_once(receiver, sandbox, acks, jobs=CUTS)
    assert submissions == {key: 1 if whole else 2 for key, whole in cut.whole.items()}


class Acks:
    """The callers' answers: the id of the job by its key."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        self._lock = threading.Lock()

    def note(self, answers: Mapping[str, Answer | None]) -> None:
        """Record answers; if one is repeated, it has to name the same job."""
        with self._lock:
            for key, answer in answers.items():
                if answer is not None:
                    assert answer.status in (200, 201, 202), answer
                    assert self.ids.setdefault(key, answer.job["id"]) == answer.job["id"]

    def wait_for(self, more: int) -> None:
        """Wait until there are that many more."""
        wanted = len(self.ids) + more
        deadline = time.monotonic() + 60
        while len(self.ids) < wanted:
            assert time.monotonic() < deadline, "no submission is acked any more"
            time.sleep(0.02)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys whose callers have no answer yet."""
        return [key for key in keys if key not in self.ids]


class Strike:
    """Handles a proxy's calls: kills the receiver when enough of them have reached one step.

    `catalogue`: a model was requested. `before`: the submission has not been passed on; `half`: without its
    last byte; `sent`: all of it. `answered`: the answer is on its way; `torn`: half of it was delivered;
    `delivered`: all of it; `uncommitted`: all of it, but the database does not let it be recorded.
    """

    def __init__(self, where: Round, receiver: ReceiverProcess) -> None:
        self._where = where
        self._receiver = receiver
        self._method = "GET" if where.step == "catalogue" else "POST"
        self._count = 1 if where.step == "catalogue" else HELD
        self._held: list[Call] = []
        self._lock = threading.Lock()
        self._ready = threading.Barrier(self._count, action=self._prepare)
        self._done = threading.Barrier(self._count, action=self._kill)
        self._killed = threading.Event()
        self._locker: threading.Thread | None = None

    def wait(self) -> list[Call]:
        """Wait until the receiver is dead; return the calls that were at the step."""
        assert self._killed.wait(30), f"only {len(self._held)} calls came to {self._where}"
        self._receiver.kill()
        if self._locker is not None:
            self._locker.join()
        return self._held

    def __call__(self, link: Link) -> None:
        """Hold a call at the step, or let it pass."""
        if link.call.method != self._method or self._killed.is_set():
            link.relay()
            return
        with self._lock:
            held = len(self._held) < self._count
            if held:
                self._held.append(link.call)
        if held:
            self._hold(link)
            link.cut()
        else:
            link.relay()

    def _hold(self, link: Link) -> None:
        step = self._where.step
        answer = b""
        if step == "half":
            link.send(-1)
        elif step not in ("catalogue", "before"):
            link.send()
            if step != "sent":
                answer = link.receive()
        self._ready.wait(30)
        if step == "torn":
            link.deliver(answer[: len(answer) // 2])
        elif step in ("delivered", "uncommitted"):
            link.deliver(answer)
        self._done.wait(30)
        if step == "sent":
            # The sandbox does not start a call if its client is already gone.
            link.receive()

    def _prepare(self) -> None:
        """Before the answers are delivered, lock the rows so that they cannot be recorded."""
        if self._where.step == "uncommitted":
            locked = threading.Event()
            self._locker = threading.Thread(target=self._lock_database, args=(locked,))
            self._locker.start()
            assert locked.wait(10)

    def _kill(self) -> None:
        time.sleep(self._where.after)
        assert self._receiver.process is not None
        self._receiver.process.kill()
        self._killed.set()

    def _lock_database(self, locked: threading.Event) -> None:
        async def hold(database: Database) -> None:
            async with database.write() as connection:
                await connection.execute(update(accounts).values(probes=accounts.c.probes))
                locked.set()
                await asyncio.to_thread(self._killed.wait, 30)

        run(self._receiver.settings["RECEIVER_DATABASE_URL"], hold)


class Cut:
    """Handles a proxy's calls: cuts the answer to the first submission of every job, each at another byte."""

    def __init__(self) -> None:
        self.bytes: list[tuple[int, int]] = []
        self.whole: dict[str, bool] = {}
        self._lock = threading.Lock()

    def __call__(self, link: Link) -> None:
        """Relay a call, and cut its answer if it is the job's first."""
        key = link.call.key
        with self._lock:
            if key is None or key in self.whole:
                number = None
            else:
                number = len(self.whole)
                self.whole[key] = False
        if key is None or number is None:
            link.relay()
            return
        link.send()
        answer = link.receive()
        head = answer.index(b"\r\n\r\n") + 4
        edges = (0, 1, head - 1, head, head + 1, len(answer) - 2, len(answer) - 1, len(answer))
        count = edges[number] if number < len(edges) else number * len(answer) // CUTS
        self.whole[key] = count == len(answer)
        self.bytes.append((count, len(answer)))
        link.deliver(answer[:count])
        link.cut(reset=number % 2 == 0 and not self.whole[key])


def calls_held(rounds: Sequence[Round]) -> dict[str, int]:
    """Return how many calls the kills of these rounds hit, by step."""
    counts: Counter[str] = Counter()
    for each in rounds:
        counts[each.step] += each.kills * (1 if each.step == "catalogue" else HELD)
    return dict(counts)


def keys_of(calls: Sequence[Call]) -> set[str]:
    """Return the idempotency keys of submissions."""
    return {call.key for call in calls if call.key is not None}


def assert_each_generated_once(
    receiver: ReceiverProcess, sandbox: Sandbox, acks: Acks, *, jobs: int
) -> dict[str, int]:
    """Wait for the end of all jobs; return how many submissions came with each of Clipia's keys."""
    rows = wait_until_done(receiver.settings["RECEIVER_DATABASE_URL"])
    assert Counter(row.state for row in rows) == {"completed": jobs}
    assert {row.idempotency_key: row.id for row in rows} == acks.ids
    assert_paid_once(sandbox, rows)
    # Forwarding is at least once: a kill may repeat a message.
    assert {line["subject"] for line in forwarded(receiver.folder)} == {row.request_id for row in rows}
    keys = sandbox.requests()["idempotency_keys"]
    return {key: count["submits"] for key, count in keys.items()}
