"""The values of `/metrics`: results by model, times of deliveries, and gauges while the database is away."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client import REGISTRY
from support import events as kit
from support.clipia import MODEL, PRICE, PROMPT, Sandbox, World, show
from support.payloads import body
from support.servers import Postgres, free_port

from receiver.api.metrics import Metrics, serving_metrics
from receiver.cli.listeners import bind
from receiver.core.payload import parse
from receiver.db.database import Database
from receiver.db.tables import deliveries
from receiver.lanes.generation_metrics import count_results
from receiver.metrics import OTHER
from receiver.settings import Settings
from receiver.submitter import Submitter

pytestmark = pytest.mark.asyncio(loop_scope="module")


def shown(name: str, **labels: str) -> float:
    """Return the value of a series of this process; 0 if there is none."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Changes:
    """The series of a model, as far as they have risen since the start."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._before = self._read()

    def _read(self) -> dict[str, float]:
        outcomes = {
            outcome: shown("receiver_generations_total", model=self._model, outcome=outcome)
            for outcome in ("completed", "failed", "canceled")
        }
        return outcomes | {
            "credits": shown("receiver_credits_total", model=self._model),
            "jobs": shown("receiver_generation_seconds_count", model=self._model),
        }

    def __call__(self) -> dict[str, float]:
        """Return those that have risen."""
        return {
            name: value - self._before[name]
            for name, value in self._read().items()
            if value != self._before[name]
        }


async def test_a_polled_result_is_counted_once(world: World, sandbox: Sandbox) -> None:
    """A result counts for its model, with its credits and the time of its job, though two lanes end it."""
    risen = Changes(MODEL)
    submitter = world.submitter()
    await submitter.submit(MODEL, PROMPT)
    sandbox.end_all()
    await world.make_due()
    assert await world.run_lane(world.poll_lane(submitter)) == 1
    await world.forward()
    assert risen() == {"completed": 1, "credits": PRICE, "jobs": 1}


async def test_a_webhook_that_ends_a_job_has_a_time(world: World, sandbox: Sandbox) -> None:
    """The time of a job that its webhook ends counts once, in the fan-out."""
    risen = Changes(MODEL)
    await sandbox.switch(webhook_loss_rate=1.0)
    submitter = world.submitter(public_url=await world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT)
    sandbox.end_all()
    assert await sandbox.send_webhook(str(job.request_id)) == 200
    await world.forward()
    assert risen() == {"completed": 1, "credits": PRICE, "jobs": 1}


async def test_a_failure_that_names_its_cost_has_no_credits() -> None:
    """Clipia refunds a failure, so the cost in it does not count."""
    risen = Changes(MODEL)
    count_results([parse(body("r-1", status="ERROR"))])
    assert risen() == {"failed": 1}


@pytest.mark.parametrize("ending", ["failed", "canceled"])
async def test_failures_are_counted_as_such(world: World, sandbox: Sandbox, ending: str) -> None:
    """A failed or canceled result counts as that, without credits."""
    risen, without_model = Changes(MODEL), Changes(OTHER)
    await sandbox.switch(fail_rate=1.0 if ending == "failed" else 0.0)
    submitter = world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    if ending == "canceled":
        await sandbox.cancel(str(job.request_id))
    sandbox.end_all()
    await world.make_due()
    assert await world.run_lane(world.poll_lane(submitter)) == 1
    await world.forward()
    # The name of the model is in the result, or only in the job.
    found = {name: risen().get(name, 0) + without_model().get(name, 0) for name in (ending, "credits")}
    assert found == {ending: 1, "credits": 0}
    assert risen()["jobs"] == 1


async def test_a_webhook_before_the_answer_has_a_time(world: World, sandbox: Sandbox) -> None:
    """The time of a job counts once if its webhook comes before Clipia's answer, and the answer ends it."""
    risen = Changes(MODEL)
    await sandbox.switch(webhook_first=True)
    submitter = world.submitter(public_url=await world.serve_callback())
    job = await submitter.submit(MODEL, PROMPT)
    assert (await show(submitter, job)).state == "completed"
    await world.forward()
    assert risen() == {"completed": 1, "credits": PRICE, "jobs": 1}


@pytest.mark.parametrize("recorder", [kit.Recorder, kit.GroupRecorder], ids=["single", "group"])
async def test_deliveries_have_their_time(
    database: Database, tmp_path: Path, recorder: type[kit.Recorder]
) -> None:
    """Each confirmed delivery has its time since the receipt; those of a replay have none."""
    name = f"timed-{recorder.__name__}".lower()

    def count() -> float:
        return shown("receiver_delivery_seconds_count", destination=name)

    before = count()
    async with kit.opened(database, tmp_path) as events:
        events.add_destination(name, recorder=recorder())
        for number in range(3):
            await events.add(kit.plain(f"r-{number}"))
        async with events.working():
            await events.until_states(deliveries, delivered=3)
            assert count() - before == 3
            assert 0 < shown("receiver_delivery_seconds_sum", destination=name) < 60
            await events.until_replayed(await events.order())
    assert len(events.recorders[name].published) == 6
    assert count() - before == 3


@asynccontextmanager
async def scraped(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the metrics of a process on a port of their own."""
    settings = Settings.load(clipia_webhook_secret="whsec_test", database_url=url)
    database = Database(url)
    submitter = Submitter(database, None)
    try:
        listeners = bind("127.0.0.1", 0)
        address = f"http://127.0.0.1:{listeners[0].getsockname()[1]}"
        async with (
            serving_metrics(Metrics.with_rows(settings, database, submitter), listeners),
            httpx.AsyncClient(base_url=address, trust_env=False, verify=False) as client,
        ):
            yield client
    finally:
        await submitter.close()
        await database.close()


async def scrape(client: httpx.AsyncClient) -> Mapping[str, str]:
    """Return the series of a scrape and their values."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return dict(line.rsplit(" ", 1) for line in lines)


async def test_gauges_stay_while_the_database_is_away(postgres: Postgres) -> None:
    """Gauges keep their last values while the database is away, and `receiver_database_up` tells it."""
    url = postgres.url(template="migrated")
    name = url.rpartition("/")[2]
    gauge = 'receiver_backlog{lane="fanout"}'
    async with scraped(url) as client:
        before = await scrape(client)
        assert (before["receiver_database_up"], before[gauge]) == ("1.0", "0.0")
        ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        postgres.sql(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        postgres.sql(ended)
        meanwhile = await scrape(client)
        assert meanwhile["receiver_database_up"] == "0.0"
        rows = {key for key in before if key.startswith(("receiver_backlog", "receiver_submissions_paused"))}
        assert len(rows) > 4
        assert {key: meanwhile.get(key) for key in rows} == {key: before[key] for key in rows}
        postgres.sql(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')

        async def is_up() -> bool:
            return (await scrape(client))["receiver_database_up"] == "1.0"

        await kit.until(is_up)
    postgres.drop(url)


async def test_gauges_that_were_never_read_are_absent() -> None:
    """Without a database since the start there is no gauge of rows: 0 would be untrue."""
    async with scraped(f"postgresql://nobody@127.0.0.1:{free_port()}/none") as client:
        found = await scrape(client)
        assert found["receiver_database_up"] == "0.0"
        rows = ("receiver_backlog", "receiver_dead_letters", "receiver_submissions_paused")
        assert [key for key in found if key.startswith((*rows, "receiver_jobs_refused"))] == []
        assert "receiver_log_records_dropped_total" in found
        assert (await client.get("/v1/jobs")).status_code == 404
