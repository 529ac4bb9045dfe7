"""F12, F13, B10: a price with a fraction is the same number at all places."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.clipia import MODEL, PROMPT, OddClipia, Request, World, accepted, answer, post, refusal, show

from receiver.db import export_import, migrate, reads
from receiver.db.database import Database
from receiver.db.tables import events, jobs


def priced(credits_: Any, result_cost: Any = None) -> Callable[[Request], bytes]:
    """Answer estimates with a price, and results with a cost."""

    def others(request: Request) -> bytes:
        if request.path.endswith("/estimate"):
            return answer(content={"credits": credits_, "warnings": []})
        if "/requests/" in request.path:
            content = {"request_id": request.path.split("/")[3], "status": "COMPLETED", "cost": result_cost}
            return answer(content=content | {"output": {}})
        if request.path.endswith("/account"):
            return answer(content={"balance": {"credits": 7.5}, "usage_30d": {"credits_spent": 100.25}})
        return answer(content={"slug": MODEL})

    return others


def messages(world: World) -> list[Any]:
    """Return the data of the delivered messages."""
    return [message.get_data() for message in world.destination.events]


pytestmark = pytest.mark.asyncio(loop_scope="module")

PRICES = [(12, "12"), (12.0, "12"), (12.5, "12.5"), (0.1, "0.1"), (0, "0"), (12.345678, "12.345678")]


@pytest.mark.parametrize(("price", "shown"), PRICES)
@pytest.mark.parametrize("way", ["webhook", "poll"])
async def test_a_price_is_one_number(
    odd_world: World, odd: OddClipia, price: float, shown: str, way: str
) -> None:
    """F13, B10: estimate, reservation, event, message, charge and sums have the same number."""
    odd.script = [accepted("r-1", cost=price)]
    odd.others = priced(price, price)
    submitter = odd_world.submitter(budgets={"shop": 1000})
    job = await submitter.submit(MODEL, PROMPT, caller="shop", max_cost=price)
    assert (json.dumps(job.cost), json.dumps(job.max_cost), job.charged) == (shown, shown, None)
    if way == "webhook":
        callback = await odd_world.serve_callback()
        said = {"request_id": "r-1", "status": "OK", "payload": {"model": MODEL, "output": {}, "cost": price}}
        await post(f"{callback}/clipia/webhook", json.dumps(said).encode())
    else:
        await odd_world.make_due()
        await odd_world.run_lane(odd_world.poll_lane(submitter))
    await odd_world.forward()
    done = await show(submitter, job)
    assert (done.state, json.dumps(done.cost), json.dumps(done.charged)) == ("completed", shown, shown)
    (data,) = messages(odd_world)
    assert json.dumps(data["cost"]) == shown
    assert "altered" not in data
    async with odd_world.database.read() as connection:
        (listed,) = await reads.list_events(connection, limit=10)
        event = await reads.show_event(connection, "r-1")
    assert event is not None
    assert json.dumps(listed["cost"]) == json.dumps(event["cost"]) == shown
    assert not [name for name in (*listed, *event) if name.endswith("_micros")]
    (row,) = await submitter.costs(by="caller")
    assert json.dumps([row["reserved"], row["charged"], row["refunded"]]) == f"[0, {shown}, 0]"


@pytest.mark.parametrize(
    "cost", [-1, -0.5, 1e300, 10**30, "12", True, [], {}, float("nan"), float("inf")], ids=repr
)
async def test_an_invalid_cost_is_null(odd_world: World, odd: OddClipia, cost: Any) -> None:
    """B10: if a cost is invalid, it is null and listed in the message; the reserved credits are charged."""
    odd.script = [accepted("r-1", cost=12.5)]
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT)
    callback = await odd_world.serve_callback()
    said = {"request_id": "r-1", "status": "OK", "payload": {"model": MODEL, "output": {}, "cost": cost}}
    await post(f"{callback}/clipia/webhook", json.dumps(said).encode())
    await odd_world.forward()
    (data,) = messages(odd_world)
    assert (data["cost"], data["altered"]) == (None, ["/cost"])
    done = await show(submitter, job)
    assert (done.state, done.cost, done.charged) == ("completed", 12.5, 12.5)


async def test_the_event_knows_a_price_that_was_lost(odd_world: World, odd: OddClipia) -> None:
    """F13: if the answer had no price, the job gets it, with its fraction, from the event."""
    odd.script = [accepted("r-1", cost=None), accepted("r-2", cost=7.25)]
    submitter = odd_world.submitter()
    first, second = [await submitter.submit(MODEL, PROMPT) for _ in range(2)]
    callback = await odd_world.serve_callback()
    for said in (
        {"request_id": "r-1", "status": "OK", "payload": {"cost": 0.75}},
        {"request_id": "r-2", "status": "ERROR", "error": {"code": "X"}},
    ):
        await post(f"{callback}/clipia/webhook", json.dumps(said).encode())
    await odd_world.forward()
    done, failed = [await show(submitter, each) for each in (first, second)]
    assert (done.cost, done.charged) == (0.75, 0.75)
    assert (failed.cost, failed.charged) == (7.25, 0)
    (row,) = await submitter.costs(by="day")
    assert (row["reserved"], row["charged"], row["refunded"]) == (0, 0.75, 7.25)


async def test_a_budget_is_held_to_the_fraction(odd_world: World, odd: OddClipia) -> None:
    """F12: eight jobs of 0.1 fit into a budget of 0.8; if there is one more, the error has the sum."""
    odd.script = [lambda: accepted(cost=0.1)]
    odd.others = priced(0.1)
    submitter = odd_world.submitter(budgets={"shop": 0.8})
    for _ in range(8):
        await submitter.submit(MODEL, PROMPT, caller="shop")
    refused = await refusal(submitter.submit(MODEL, PROMPT, caller="shop"))
    assert refused.code == "budget_exceeded"
    assert "costs 0.1 credits, but 0.8 of today's 0.8 for 'shop' are already spent" in str(refused)


async def test_a_limit_is_held_to_the_fraction(odd_world: World, odd: OddClipia) -> None:
    """F12: a job of 12.5 is rejected if it may cost 12.4, and accepted if it may cost 12.5."""
    odd.script = [accepted(cost=12.5)]
    odd.others = priced(12.5)
    submitter = odd_world.submitter()
    refused = await refusal(submitter.submit(MODEL, PROMPT, max_cost=12.4))
    assert (refused.code, str(refused)) == (
        "max_cost_exceeded",
        "the job costs 12.5 credits, more than its max_cost of 12.4",
    )
    assert (await submitter.submit(MODEL, PROMPT, max_cost=12.5)).cost == 12.5


async def test_the_spelling_of_a_limit_does_not_matter(odd_world: World, odd: OddClipia) -> None:
    """F2: the same key with max_cost 12 and 12.0 is one job."""
    odd.script = [accepted(cost=12)]
    odd.others = priced(12)
    submitter = odd_world.submitter()
    first = await submitter.submit(MODEL, PROMPT, idempotency_key="k", max_cost=12)
    again = await submitter.submit(MODEL, PROMPT, idempotency_key="k", max_cost=12.0)
    assert first.id == again.id


async def test_the_account_is_compared_to_the_fraction(odd_world: World, odd: OddClipia) -> None:
    """F13: if Clipia charged more than our jobs cost, the difference is exact."""
    odd.script = [accepted("r-1", cost=0.1)]
    odd.others = priced(0.1, 0.05)
    submitter = odd_world.submitter()
    await submitter.submit(MODEL, PROMPT)
    await odd_world.make_due()
    await odd_world.run_lane(odd_world.poll_lane(submitter))
    account = await submitter.account()
    assert (account["ledger_30d"]["charged"], account["difference_30d"]) == (0.05, 100.2)
    assert account["balance"] == {"credits": 7.5}


async def test_fractions_move_to_another_database(odd_world: World, odd: OddClipia, tmp_path: Path) -> None:
    """F13: an export has the fractions of events and jobs; an export of an older release has none."""
    odd.script = [accepted("r-1", cost=12.5)]
    odd.others = priced(12.5, 12.25)
    submitter = odd_world.submitter()
    job = await submitter.submit(MODEL, PROMPT, max_cost=13.5)
    await odd_world.make_due()
    await odd_world.run_lane(odd_world.poll_lane(submitter))
    lines: list[dict[str, Any]] = []
    async with odd_world.database.read() as connection:
        for kind in ("event", "job"):
            found, _ = await export_import.read(connection, kind, after=0, limit=10, since=None, until=None)
            lines += json.loads(json.dumps(found, default=str))
    for older in (False, True):
        other = Database(f"sqlite:///{tmp_path / f'other-{older}.db'}")
        await migrate.upgrade(other)
        if older:
            lines = [{name: v for name, v in line.items() if not name.endswith("_micros")} for line in lines]
        async with other.write() as connection:
            await export_import.write(connection, lines)
        async with other.read() as connection:
            row = await reads.show_job(connection, job.id)
            event = await reads.show_event(connection, "r-1")
        assert row is not None
        assert event is not None
        prices = (row["cost"], row["charged"], row["max_cost"], event["cost"])
        assert prices == ((12, 12, 13, 12) if older else (12.5, 12.25, 13.5, 12.25))
        await other.close()


async def test_the_release_before_can_write(odd_world: World) -> None:
    """C15: if rows are from before fractions, they have whole prices."""
    async with odd_world.database.read() as connection:
        for table in (events, jobs):
            for column in table.c:
                if column.name.endswith("_micros"):
                    assert column.server_default is not None
        assert await reads.job_costs(connection, by="day") == []
