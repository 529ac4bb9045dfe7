"""`/v1/events`, `/v1/deliveries` and `/v1/replays` over HTTP, on both databases."""

import base64
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.routing import Route
from support.events import World, opened, plain
from support.payloads import SECRET, failure, signed
from support.servers import free_port

from receiver.api import dead_letters
from receiver.app import create_app
from receiver.db import outbox
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import NewMedia, event_id
from receiver.db.tables import attempts, deliveries, events, media, replays
from receiver.settings import Settings

OPERATOR = "operator-0123456789abcdef"
TOKENS = {
    "submitter": "submitter-0123456789abcdef",
    "reader": "reader-0123456789abcdef",
    "both": "both-0123456789abcdef",
    "ops": OPERATOR,
}
SCOPES = {"submitter": "submit", "reader": "read", "both": "submit+read", "ops": "operate"}
NOBODY = str(uuid.UUID(int=7))
LISTS = ["/v1/events", "/v1/deliveries", "/v1/replays"]
BEYOND = [("since", "0001-01-01T00:00:00+23:00"), ("until", "9999-12-31T23:59:59-23:00")]
ROUTES = [
    ("GET", "/v1/events"),
    ("GET", "/v1/events/{id}"),
    ("DELETE", "/v1/events/{id}"),
    ("POST", "/v1/events/fetch"),
    ("GET", "/v1/events/{id}/receipts"),
    ("POST", "/v1/events/{id}/receipts/{seq}/promote"),
    ("POST", "/v1/events/{id}/replay"),
    ("GET", "/v1/events/{id}/route"),
    ("GET", "/v1/events/{id}/links"),
    ("POST", "/v1/events/{id}/give-up"),
    ("GET", "/v1/deliveries"),
    ("POST", "/v1/deliveries/retry"),
    ("POST", "/v1/deliveries/move"),
    ("POST", "/v1/deliveries/discard"),
    ("GET", "/v1/deliveries/failures"),
    ("GET", "/v1/deliveries/{id}"),
    ("GET", "/v1/deliveries/{id}/message"),
    ("POST", "/v1/deliveries/{id}/discard"),
    ("POST", "/v1/deliveries/{id}/retry"),
    ("GET", "/v1/replays"),
    ("POST", "/v1/replays"),
    ("GET", "/v1/replays/{id}"),
    ("POST", "/v1/replays/{id}/cancel"),
]


class Site:
    """A receiver without a worker, an operator's client, and the receiver's database."""

    def __init__(self, app: Starlette, world: World) -> None:
        self.app = app
        self.world = world
        self.operator = self.client(OPERATOR)

    def client(self, token: str | None) -> httpx.AsyncClient:
        """Return a client that sends a token."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return httpx.AsyncClient(transport=transport, base_url="http://receiver", headers=headers)

    async def get(self, path: str, **query: Any) -> httpx.Response:
        """Send a GET request as an operator."""
        return await self.operator.get(path, params=query)

    async def data(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """Return the rows of a list."""
        response = await self.get(path, **query)
        assert response.status_code == 200, response.text
        rows: list[dict[str, Any]] = response.json()["data"]
        return rows

    async def post(self, path: str, content: Any = None, *, key: str | None = None) -> httpx.Response:
        """Send a POST request as an operator."""
        headers = {} if key is None else {"idempotency-key": key}
        if content is None:
            return await self.operator.post(path, headers=headers)
        return await self.operator.post(path, json=content, headers=headers)

    async def receive(self, content: bytes) -> None:
        """Send a webhook."""
        response = await self.operator.post("/clipia/webhook", content=content, headers=signed(content))
        assert response.status_code == 200


@asynccontextmanager
async def make_site(database: Database, url: str, folder: Path) -> AsyncIterator[Site]:
    """Open a receiver with two destinations, one of them filtered, and without its worker."""
    folder.joinpath("receiver.toml").write_text(
        '[[destinations]]\nname = "main"\nurl = "file:main.jsonl"\n'
        '[[destinations]]\nname = "failures"\nurl = "file:failures.jsonl"\nfilter = { status = "ERROR" }\n'
    )
    settings = Settings.load(
        database_url=url,
        clipia_webhook_secret=SECRET,
        api_tokens=",".join(f"{name}:{token}:{SCOPES[name]}" for name, token in TOKENS.items()),
    )
    app = create_app(settings, worker=False)
    async with app.router.lifespan_context(app), opened(database, folder / "media") as world:
        world.add_destination("main")
        world.add_destination("failures", status="ERROR")
        site = Site(app, world)
        yield site
        await site.operator.aclose()


@pytest.fixture
async def site(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    """A receiver with the defaults."""
    async with make_site(database, database_url, tmp_path) as made:
        yield made


def error_of(response: httpx.Response) -> tuple[int, str]:
    """Return status and code of an error in Clipia's shape."""
    error = response.json()["error"]
    assert error["type"]
    assert error["message"]
    return response.status_code, error["code"]


def path_with(path: str, id_: str = NOBODY) -> str:
    """Return a route's path with an id in it."""
    return path.replace("{id}", id_)


async def test_only_operators_see_and_change_events(site: Site) -> None:
    """G1, E12: each route rejects callers without a token (401) and without `operate` (403)."""
    for token, expected in (
        (None, (401, "invalid_token")),
        ("wrong-0123456789abcdef", (401, "invalid_token")),
        *((TOKENS[name], (403, "insufficient_scope")) for name in ("submitter", "reader", "both")),
    ):
        async with site.client(token) as client:
            for method, path in ROUTES:
                response = await client.request(
                    method, path_with(path), json={} if method == "POST" else None
                )
                assert (path, error_of(response)) == (path, expected)
    for method, path in ROUTES:
        response = await site.operator.request(method, path_with(path), json={} if method == "POST" else None)
        assert response.status_code in {200, 202, 400, 404}, path


async def test_every_route_of_events_and_replays_is_in_these_tests(site: Site) -> None:
    """G1: a new route has to be added to the matrix above."""
    found = {
        (method, route.path)
        for route in site.app.routes
        if isinstance(route, Route) and route.path.startswith(("/v1/events", "/v1/deliveries", "/v1/replays"))
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert found == set(ROUTES)


async def test_wrong_methods_and_paths_have_the_same_error_shape(site: Site) -> None:
    """G1: a wrong method is 405 and a wrong path 404, in Clipia's error shape."""
    assert error_of(await site.operator.delete("/v1/events")) == (405, "method_not_allowed")
    assert error_of(await site.get("/v1/events/a/b/c")) == (404, "not_found")


async def test_events_are_listed_and_filtered(site: Site) -> None:
    """Events are listed newest first, without bodies, with the states of files and deliveries, by filter."""
    world = site.world
    await world.add_history(plain("r-1"), plain("r-2", model="other"), failure("r-3"))
    await world.add(plain("r-4"), source="staging")
    await world.add(b"strange")
    moment = datetime.now(UTC) - timedelta(days=1)
    await world.change(events, events.c.request_id == "r-1", received_at=moment - timedelta(hours=1))
    rows = await site.data("/v1/events")
    assert [row["request_id"] for row in rows][1:] == ["r-4", "r-3", "r-2", "r-1"]
    assert rows[0]["state"] == "unrecognized"
    assert "body" not in rows[1]
    assert rows[2]["deliveries"] == {"delivered": 2}
    assert (rows[1]["deliveries"], rows[1]["media"]) == ({}, {})
    for query, expected in (
        ({"source": "staging"}, ["r-4"]),
        ({"state": "received"}, ["r-4"]),
        ({"status": "ERROR"}, ["r-3"]),
        ({"model": "other"}, ["r-2"]),
        ({"until": moment.isoformat()}, ["r-1"]),
        ({"since": moment.isoformat(), "status": "OK", "state": "ready"}, ["r-2"]),
        ({"until": "2020-01-01"}, []),
    ):
        assert [row["request_id"] for row in await site.data("/v1/events", **query)] == expected


async def test_lists_come_in_pages(site: Site) -> None:
    """Each page has the cursor of the next one; together the pages are the whole list."""
    await site.world.add_history(*(plain(f"r-{number}") for number in range(5)))
    for _ in range(5):
        await site.world.order()
    for path, limit in product(LISTS, (1, 2, 5, 200)):
        whole = await site.data(path)
        assert len(whole) == 5
        pages, cursor = [], None
        for _ in range(10):
            query = {"limit": limit} | ({} if cursor is None else {"cursor": cursor})
            page = (await site.get(path, **query)).json()
            assert len(page["data"]) <= limit
            pages += page["data"]
            cursor = page["next"]
            if cursor is None:
                break
        assert pages == whole


async def test_bad_parameters_are_named(site: Site) -> None:
    """A bad limit, cursor or time or an unknown parameter is 400, and the message names it."""
    queries = [("limit", limit) for limit in ("0", "201", "-1", "x", "1e1", "²", "")]
    queries += [("cursor", cursor) for cursor in ("x", "-1", "1.5", "9" * 30, "²")]
    queries += [("absent", "x"), ("body", "x")]
    times = [*product(("since", "until"), ("x", "", "2026-13-01", "-1"))]
    for path in LISTS:
        for name, value in queries + (times if path != "/v1/replays" else []):
            response = await site.get(path, **{name: value})
            assert (path, name, value, error_of(response)) == (path, name, value, (400, "invalid_request"))
            if name != "cursor":
                assert name in response.json()["error"]["message"]


async def test_times_beyond_the_calendar_are_rejected(site: Site) -> None:
    """A time before the year 1 or after 9999 in UTC is 400."""
    for path, (name, value) in product(LISTS[:2], BEYOND):
        response = await site.get(path, **{name: value})
        assert (path, error_of(response)) == (path, (400, "invalid_request"))
    for name, value in BEYOND:
        response = await site.post("/v1/replays", {"selection": {name: value}})
        assert error_of(response) == (400, "invalid_request")
        response = await site.post("/v1/deliveries/retry", {name: value})
        assert error_of(response) == (400, "invalid_request")


async def test_nul_in_text_is_not_an_internal_error(site: Site) -> None:
    """G1: a filter or an id with NUL finds no row or is rejected; it is never an internal error."""
    for path in (
        *(f"/v1/events?{name}=a%00b" for name in ("source", "state", "status", "model")),
        *(f"/v1/deliveries?{name}=a%00b" for name in ("state", "destination")),
        "/v1/events/a%00b",
    ):
        response = await site.operator.get(path)
        assert response.status_code in {200, 400, 404}, path
    for path, content in (
        ("/v1/events/a%00b/replay", {}),
        ("/v1/deliveries/retry", {"destination": "a\x00b"}),
        ("/v1/replays", {"selection": {"source": "a\x00b"}}),
        ("/v1/replays", {"to": ["a\x00b"]}),
    ):
        response = await site.post(path, content)
        assert response.status_code in {202, 400, 404}, path


async def test_an_event_is_shown_with_its_rows(site: Site) -> None:
    """An event is found by its id or request_id, with its body, receipts, deliveries and attempts."""
    await site.receive(plain("r-1"))
    await site.receive(plain("r-1"))
    async with site.world.working():
        await site.world.until_states(deliveries, delivered=1)
    for key in ("r-1", str(event_id("clipia", "r-1"))):
        response = await site.get(f"/v1/events/{key}")
        assert response.headers["cache-control"] == "no-store"
        event = response.json()
        assert event["body"]["payload"]["model"] == "m"
        assert [receipt["outcome"] for receipt in event["receipts"]] == ["accepted", "duplicate"]
        assert event["receipts_total"] == 2
        (delivery,) = event["deliveries"]
        assert (delivery["destination"], delivery["state"]) == ("main", "delivered")
        assert [attempt["outcome"] for attempt in delivery["attempt_log"]] == ["succeeded"]
        assert "lease" not in delivery


async def test_receipts_come_in_pages(site: Site) -> None:
    """Receipts of an event are listed oldest first, a conflict with its body as base64."""
    bodies = [plain("r-1"), plain("r-1"), plain("r-1", model="second")]
    for body in bodies:
        await site.receive(body)
    first = (await site.get("/v1/events/r-1/receipts", limit=2)).json()
    assert [row["outcome"] for row in first["data"]] == ["accepted", "duplicate"]
    second = (await site.get("/v1/events/r-1/receipts", limit=2, cursor=first["next"])).json()
    assert [(row["outcome"], row["repeated"]) for row in second["data"]] == [("conflict", 0)]
    assert base64.b64decode(second["data"][0]["body"]) == bodies[2]
    assert second["next"] is None
    assert error_of(await site.get("/v1/events/r-1/receipts", cursor="x")) == (400, "invalid_request")
    assert error_of(await site.get("/v1/events/absent/receipts")) == (404, "not_found")


async def test_odd_bodies_are_shown_as_bytes(site: Site) -> None:
    """B11: a body that is not JSON, and that of a conflict, are shown as base64."""
    odd = b"\xff\x00 strange"
    await site.receive(odd)
    await site.receive(plain("r-1", model="first"))
    await site.receive(plain("r-1", model="second"))
    (strange,) = await site.data("/v1/events", state="unrecognized")
    shown = (await site.get(f"/v1/events/{strange['id']}")).json()
    assert base64.b64decode(shown["body_base64"]) == odd
    assert "body" not in shown
    receipts = (await site.get("/v1/events/r-1")).json()["receipts"]
    assert [receipt["outcome"] for receipt in receipts] == ["accepted", "conflict"]
    assert receipts[0]["body"] is None
    assert base64.b64decode(receipts[1]["body"]) == plain("r-1", model="second")


async def test_unknown_and_invalid_ids_are_404(site: Site) -> None:
    """An unknown id is 404, and so is a text that is not an id."""
    await site.world.add_history(plain("r-1"))
    for (method, path), key in product(ROUTES, ("absent", NOBODY, "%20", "a%2Fb", "x" * 300)):
        if "{id}" in path:
            response = await site.operator.request(method, path_with(path, key))
            assert (path, key, error_of(response)) == (path, key, (404, "not_found"))


async def test_one_event_is_replayed(site: Site) -> None:
    """E12: the answer is 202 with the replay's path; the caller is on record; `to` selects destinations."""
    await site.world.add_history(failure("r-1"), failure("r-2"))
    response = await site.post("/v1/events/r-1/replay")
    order = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/replays/{order['id']}"
    assert response.headers["idempotency-key"] == order["idempotency_key"]
    assert (order["caller"], order["matched"], order["state"]) == ("ops", 1, "pending")
    assert order["selection"]["ids"] == [str(event_id("clipia", "r-1"))]
    narrow = await site.post(
        f"/v1/events/{event_id('clipia', 'r-2')}/replay", {"to": ["failures"], "reason": "asked for"}
    )
    assert (narrow.json()["destinations"], narrow.json()["reason"]) == (["failures"], "asked for")
    async with site.world.working():
        for each in (order, narrow.json()):
            await site.world.until_replayed({"id": uuid.UUID(each["id"])})
    done = (await site.get(f"/v1/replays/{order['id']}")).json()
    assert done["deliveries"] == {"main": {"delivered": 1}, "failures": {"delivered": 1}}
    done = (await site.get(f"/v1/replays/{narrow.json()['id']}")).json()
    assert done["deliveries"] == {"failures": {"delivered": 1}}


async def test_a_replay_is_ordered_by_filter(site: Site) -> None:
    """E12: POST /v1/replays takes a selection, destinations, a rate and a reason, and dry_run only counts."""
    await site.world.add_history(plain("r-1"), plain("r-2", model="seedance-2"), failure("r-3"))
    order = {
        "selection": {"model": "seedance-*", "since": "2020-01-01T00:00:00Z"},
        "to": ["main"],
        "rate": 50,
        "reason": "the shop lost its disk",
        "media": False,
        "force": False,
    }
    counted = await site.post("/v1/replays", order | {"dry_run": True})
    assert (counted.status_code, counted.json()) == (200, {"events": 1, "deliveries": {"main": 1}})
    assert (await site.post("/v1/replays", {"all": True, "dry_run": True})).json() == {
        "events": 3,
        "deliveries": {"main": 3, "failures": 1},
    }
    assert await site.data("/v1/replays") == []
    made = await site.post("/v1/replays", order | {"dry_run": False})
    assert made.status_code == 202
    (listed,) = await site.data("/v1/replays")
    assert listed["id"] == made.json()["id"]
    assert (listed["reason"], listed["rate"], listed["caller"]) == ("the shop lost its disk", 50.0, "ops")
    assert listed["selection"]["model"] == "seedance-*"


async def test_an_invalid_dry_run_orders_no_replay(site: Site) -> None:
    """E12: if `dry_run` is neither true nor false, the answer is 400 and no replay is ordered."""
    await site.world.add_history(plain("r-1"))
    values: list[Any] = ["true", 1, "no", None, []]
    for value in values:
        response = await site.post("/v1/replays", {"dry_run": value})
        assert (value, response.status_code) == (value, 400)
    assert await site.world.rows(replays) == []


async def test_a_key_is_one_replay(site: Site) -> None:
    """E12: the same order with the same key is the same replay; another order with that key is 409."""
    await site.world.add_history(plain("r-1"))
    first = await site.post("/v1/replays", {"all": True, "reason": "a"}, key="monday")
    again = await site.post("/v1/replays", {"all": True, "reason": "a"}, key="monday")
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotency-key"] == "monday"
    other = await site.post("/v1/replays", {"all": True, "reason": "b"}, key="monday")
    assert error_of(other) == (409, "idempotency_key_reuse")
    single = await site.post("/v1/events/r-1/replay", key="monday")
    assert error_of(single) == (409, "idempotency_key_reuse")
    assert len(await site.data("/v1/replays")) == 1


async def test_a_key_that_is_too_long_is_rejected(site: Site) -> None:
    """F8: a key has at most 255 characters, on every database."""
    await site.world.add_history(plain("r-1"))
    for length, status in ((255, 202), (256, 400), (10_000, 400)):
        response = await site.post("/v1/replays", {"all": True}, key="x" * length)
        assert (length, response.status_code) == (length, status)


BAD_ORDERS = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[]", "JSON object"),
    (b'{"selection": []}', "selection"),
    (b'{"selection": {"status": "ok"}}', "selection.status"),
    (b'{"selection": {"since": "monday"}}', "selection.since"),
    (b'{"all": true, "to": []}', "to is empty"),
    (b'{"selection": {"ids": ["nobody"]}}', "'nobody'"),
    (b'{"selection": {"ids": ["r-1", 2]}}', "selection.ids.1"),
    (b'{"selection": {"model": ""}}', "selection.model"),
    (b'{"selection": {"modle": "x"}}', "selection.modle"),
    (b'{"rate": 0}', "rate"),
    (b'{"rate": "fast"}', "rate"),
    (b'{"media": "perhaps"}', "media"),
    (b'{"to": "main"}', "to"),
    (b'{"all": true, "to": ["absent"]}', "absent"),
    (b'{"absent": 1}', "absent"),
    (b"{}", "say which events"),
    (b'{"selection": {}}', "say which events"),
    (b'{"selection": {"ids": []}}', "ids is empty"),
    (b'{"all": true, "selection": {"ids": []}}', "ids is empty"),
    (b'{"all": true, "rate": 1e-9}', "rate"),
    (b'{"all": true, "reason": "\\ud800"}', "surrogates"),
]


async def test_bad_orders_name_the_field(site: Site) -> None:
    """E12: a bad order is 400 and names the field, and no replay is ordered."""
    for content, printed in BAD_ORDERS:
        response = await site.operator.post("/v1/replays", content=content)
        assert error_of(response) == (400, "invalid_request")
        assert printed in response.json()["error"]["message"]
    assert await site.world.rows(replays) == []


async def test_bodies_have_a_limit(site: Site) -> None:
    """G11: a body larger than a megabyte is rejected."""
    response = await site.post("/v1/replays", {"reason": "x" * 1_100_000})
    assert response.status_code in {400, 413}
    assert "selection" not in response.text


async def test_a_replay_is_canceled(site: Site) -> None:
    """E12: canceling answers with the canceled replay; a second time it is 409."""
    await site.world.add_history(plain("r-1"))
    order = (await site.post("/v1/replays", {"all": True})).json()
    canceled = await site.post(f"/v1/replays/{order['id']}/cancel")
    assert (canceled.status_code, canceled.json()["state"]) == (200, "canceled")
    assert error_of(await site.post(f"/v1/replays/{order['id']}/cancel")) == (409, "not_cancelable")
    assert (await site.get(f"/v1/replays/{order['id']}")).json()["state"] == "canceled"


async def kill(site: Site, count: int) -> list[dict[str, Any]]:
    """Make dead letters; return them as the API lists them, oldest first."""
    await site.world.add_history(*(plain(f"r-{number}") for number in range(count)))
    chosen = deliveries.c.event_seq.in_(select(events.c.seq).where(events.c.request_id.like("r-_")))
    await site.world.change(
        deliveries, chosen, state="dead", error="PublishRejected: 422", finished_at=db_time(-60.0)
    )
    return (await site.data("/v1/deliveries", state="dead"))[::-1]


async def test_deliveries_are_listed_with_their_reasons(site: Site) -> None:
    """E4: deliveries are listed by state, destination and time, each with its event and its last error."""
    await site.world.add_history(failure("other"))
    dead = await kill(site, 2)
    assert [row["request_id"] for row in dead] == ["r-0", "r-1"]
    assert {row["error"] for row in dead} == {"PublishRejected: 422"}
    assert {row["event_id"] for row in dead} == {str(event_id("clipia", f"r-{n}")) for n in range(2)}
    assert "lease" not in dead[0]
    await site.world.change(
        deliveries, deliveries.c.id == uuid.UUID(dead[0]["id"]), created_at=db_time(-86_400.0)
    )
    hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    for query, count in (
        ({}, 4),
        ({"state": "delivered"}, 2),
        ({"destination": "failures"}, 1),
        ({"state": "dead", "destination": "failures"}, 0),
        ({"state": "dead", "since": hour_ago}, 1),
        ({"state": "dead", "until": hour_ago}, 1),
    ):
        assert (query, len(await site.data("/v1/deliveries", **query))) == (query, count)


async def test_one_dead_letter_is_retried(site: Site) -> None:
    """E4, E15: a dead letter is restarted once, with the caller on record; a pending delivery is 404."""
    first, second = await kill(site, 2)
    done = await site.post(f"/v1/deliveries/{first['id']}/retry")
    assert (done.status_code, done.json()) == (202, {"restarted": {"main": 1}})
    again = await site.post(f"/v1/deliveries/{first['id']}/retry")
    assert error_of(again) == (404, "not_found")
    (record,) = await site.world.rows(attempts)
    assert (record["outcome"], record["error"]) == ("restarted", "by ops")
    assert str(record["work_id"]) == first["id"]
    async with site.world.working():
        await site.world.until_states(deliveries, delivered=1, dead=1)
    assert [row["id"] for row in await site.data("/v1/deliveries", state="dead")] == [second["id"]]


async def test_dead_letters_are_counted_until_they_are_retried(site: Site) -> None:
    """E4: the metrics have the number of dead letters of each destination, even if it is 0."""

    async def counts() -> set[str]:
        async with site.client(TOKENS["reader"]) as reader:
            lines = (await reader.get("/metrics")).text.splitlines()
        # A test before this one may have had other destinations, and gauges belong to the process.
        ours = ('receiver_dead_letters{destination="main"}', 'receiver_dead_letters{destination="failures"}')
        return {line for line in lines if line.startswith(ours)}

    (first, *_) = await kill(site, 3)
    assert await counts() == {
        'receiver_dead_letters{destination="main"} 3.0',
        'receiver_dead_letters{destination="failures"} 0.0',
    }
    await site.post(f"/v1/deliveries/{first['id']}/retry")
    assert 'receiver_dead_letters{destination="main"} 2.0' in await counts()
    await site.post("/v1/deliveries/retry", {"all": True})
    assert 'receiver_dead_letters{destination="main"} 0.0' in await counts()


async def test_dead_letters_are_retried_by_filter(site: Site) -> None:
    """E4: dead letters are restarted by ids, by destination, by time, or all of them with `all`."""
    dead = await kill(site, 4)
    earlier = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    for content, count in (
        ({"ids": [dead[0]["id"], NOBODY]}, 1),
        ({"destination": "failures"}, 0),
        ({"until": earlier}, 0),
        ({"since": earlier, "ids": [dead[0]["id"], dead[1]["id"]]}, 1),
        ({"destination": "main", "since": earlier, "until": "2100-01-01"}, 2),
        ({"all": True}, 0),
    ):
        response = await site.post("/v1/deliveries/retry", content)
        assert response.status_code == 202, response.text
        answer = response.json()
        assert (answer["restarted"], answer["more"]) == ({"main": count} if count else {}, False)
    assert await site.world.states(deliveries) == {"pending": 4}


async def test_a_retry_says_whether_there_are_more(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """E5: one call restarts a limited number, and `more` tells whether to call again."""
    monkeypatch.setattr(dead_letters, "MAX_RESTARTED", 2)
    await kill(site, 3)
    answers = [(await site.post("/v1/deliveries/retry", {"all": True})).json() for _ in range(3)]
    assert [(answer["restarted"], answer["more"]) for answer in answers] == [
        ({"main": 2}, True),
        ({"main": 1}, False),
        ({}, False),
    ]


BAD_RETRIES: list[dict[str, Any]] = [
    {},
    {"all": False},
    {"all": "true"},
    {"ids": []},
    {"ids": "x"},
    {"ids": ["x"]},
    {"ids": [7]},
    {"destination": 7},
    {"destination": ["main"]},
    {"since": 7},
    {"until": "yesterday"},
    {"all": True, "absent": 1},
    {"state": "pending", "all": True},
]


async def test_a_retry_of_everything_needs_all(site: Site) -> None:
    """E12: a retry without a filter or with an invalid one is 400 and restarts no dead letter."""
    await kill(site, 1)
    for content in BAD_RETRIES:
        response = await site.post("/v1/deliveries/retry", content)
        assert (content, error_of(response)) == (content, (400, "invalid_request"))
    assert await site.world.states(deliveries) == {"dead": 1}


async def test_without_a_database_everything_is_503(tmp_path: Path) -> None:
    """G13: without the database every route is 503 with Retry-After, and no detail of the database."""
    settings = Settings.load(
        database_url=f"postgresql://canary@127.0.0.1:{free_port()}/x",
        clipia_webhook_secret=SECRET,
        destination_url=f"file:{tmp_path / 'events.jsonl'}",
        api_tokens=f"ops:{OPERATOR}:operate",
    )
    app = create_app(settings, worker=False)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"authorization": f"Bearer {OPERATOR}"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://receiver", headers=headers) as client,
    ):
        for method, path in ROUTES:
            content: dict[str, Any] = {"all": True} if path.endswith(("retry", "replays")) else {}
            if path.endswith(("move", "discard")):
                content = {"destination": "old"} | ({"to": "main"} if path.endswith("move") else {})
            response = await client.request(
                method, path_with(path), json=content if method == "POST" else None
            )
            assert (path, error_of(response)) == (path, (503, "service_unavailable"))
            assert int(response.headers["retry-after"]) > 0
            assert "canary" not in response.text


async def test_operators_see_every_callers_events(site: Site) -> None:
    """G3: these lists have the events of all callers, so they need `operate`."""
    await site.world.add_job("theirs", caller="somebody", request_id="r-1")
    await site.world.add_history(plain("r-1"))
    assert len(await site.data("/v1/events")) == 1
    counted = await site.post("/v1/replays", {"selection": {"caller": "somebody"}, "dry_run": True})
    assert counted.json()["events"] == 1


async def test_an_event_is_erased(site: Site, tmp_path: Path) -> None:
    """G9: a tombstone stays; 409 if a delivery is pending; 503 if the storage is away, until a repeat."""
    await site.world.add_history(plain("r-1"), plain("r-2"))
    await site.world.change(deliveries, state="pending")
    assert error_of(await site.operator.delete("/v1/events/r-1")) == (409, "not_settled")
    await site.world.change(deliveries, state="delivered")
    file = tmp_path / "data" / "media" / "r-1" / "0.png"
    file.mkdir(parents=True)  # a folder cannot be deleted as a file
    async with site.world.database.write() as connection:
        (first, _) = (await connection.execute(select(events.c.seq).order_by(events.c.seq))).scalars()
        new = NewMedia(position=0, variant="original", kind="image", url="https://media.clipia.ai/a.png")
        await outbox.insert_media(connection, [(first, new)])
    await site.world.change(media, state="stored", storage_key="r-1/0.png", uri=file.as_uri())
    assert error_of(await site.operator.delete("/v1/events/r-1")) == (503, "service_unavailable")
    file.rmdir()
    file.write_bytes(b"a private picture")
    expected = {"id": str(event_id("clipia", "r-1")), "request_id": "r-1", "files": 1, "files_elsewhere": []}
    answer = await site.operator.delete("/v1/events/r-1")
    assert (answer.status_code, answer.json()) == (200, expected)
    assert not file.exists()
    shown = (await site.get("/v1/events/r-1")).json()
    assert (shown["state"], shown["body_base64"]) == ("erased", "")
    assert [row["request_id"] for row in await site.data("/v1/events", state="erased")] == ["r-1"]
    assert (await site.operator.delete(f"/v1/events/{event_id('clipia', 'r-1')}")).json()["files"] == 0
    for path in (f"/v1/events/{NOBODY}", "/v1/events/r-%00", "/v1/events/unknown"):
        assert error_of(await site.operator.delete(path)) == (404, "not_found")


async def test_an_unknown_destination_in_a_filter_is_an_error(site: Site) -> None:
    """A mistyped destination is 400 and names the known ones; a removed one with deliveries is known."""
    world = site.world
    world.add_destination("removed")
    await world.add(plain("r-1"))
    await world.fan_out()
    await world.change(deliveries, deliveries.c.destination == "main", state="delivered")
    for path in ("/v1/events", "/v1/deliveries", "/v1/deliveries/failures", "/v1/tail"):
        response = await site.get(path, destination="mian", **({"wait": 0} if path == "/v1/tail" else {}))
        assert error_of(response) == (400, "invalid_request"), path
        assert response.json()["error"]["message"].endswith("known: failures, main, removed")
    retried = await site.post("/v1/deliveries/retry", {"destination": "mian"})
    assert error_of(retried) == (400, "invalid_request")
    assert len(await site.data("/v1/events", destination="removed")) == 1
    assert await site.data("/v1/deliveries", destination="failures") == []
    # A removed destination of which only delivered events are left: they are found.
    await world.change(deliveries, state="delivered")
    assert len(await site.data("/v1/deliveries", destination="removed")) == 1
