"""B7-B9: a signed body with odd characters is a normal event, from the callback to the destinations."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.events import RETRY, World, opened
from support.kinds import ALL_KINDS
from support.kinds_base import Kind
from support.payloads import SECRET, signed

from receiver.app import create_app
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.tables import deliveries, events, media
from receiver.lanes.targets import Target
from receiver.sandbox import SandboxOptions, running
from receiver.sandbox import create_app as create_sandbox
from receiver.settings import Settings

SEED = 15860307465884635512

ODD: dict[str, tuple[bytes, Any, list[str]]] = {
    # The output, its forwarded form, and the pointers to the differences.
    "B7 byte order mark": (b"1", 1, []),
    "B8 not UTF-8": (b'"caf\xe9"', "caf\ufffd", ["/output/odd"]),
    "B8 overlong": (b'"\xc0\xaf"', "\ufffd\ufffd", ["/output/odd"]),
    "B9 unsigned 64 bits": (str(SEED).encode(), SEED, []),
    "B9 beyond 64 bits": (b"18446744073709551616", "18446744073709551616", ["/output/odd"]),
    "B9 5,000 digits": (b"9" * 5000, "9" * 5000, ["/output/odd"]),
    "B9 NaN": (b"[1,NaN]", [1, None], ["/output/odd/1"]),
    "B9 Infinity": (b"[Infinity,-Infinity]", [None, None], ["/output/odd/0", "/output/odd/1"]),
    "B9 1e400": (b"1e400", None, ["/output/odd"]),
    "B9 NUL": (b'"a\\u0000b"', "a\ufffdb", ["/output/odd"]),
    "B9 raw NUL": (b'"a\x00b\tc"', "a\ufffdb\tc", ["/output/odd"]),
    "B9 half an emoji": (b'"a \\ud83d"', "a \ufffd", ["/output/odd"]),
    "B9 half an emoji in a name": (b'{"\\udc00":1}', {"\ufffd": 1}, ["/output/odd/\ufffd"]),
    "B9 a name twice": (b'{"a":1,"a":2}', {"a": 2}, ["/output/odd/a"]),
    "B9 33 levels": (b"[" * 33 + b"]" * 33, None, []),
    "B9 50,000 levels": (b"[" * 50_000 + b"]" * 50_000, None, ["/output/odd" + "/0" * 61]),
}


@pytest.fixture
async def cdn() -> AsyncIterator[str]:
    """A CDN with real files."""
    async with running(create_sandbox(SandboxOptions())) as url:
        yield url


@pytest.fixture
async def kinds(tmp_path: Path) -> AsyncIterator[dict[str, Kind]]:
    """A file, an HTTP server in both modes, and a broker."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(ALL_KINDS[name](tmp_path / name.replace(" ", "-")))
            for name in ("file", "http", "redis")
        }


@pytest.fixture
async def world(database: Database, tmp_path: Path, cdn: str, kinds: dict[str, Kind]) -> AsyncIterator[World]:
    """Workers with these destinations."""
    async with opened(database, tmp_path / "media", cdn) as made:
        for name, kind in kinds.items():
            destination = kind.open()
            await destination.start()
            made.targets.append(Target(name=name, destination=destination, waits_for_media=True, retry=RETRY))
        yield made
        for target in made.targets:
            await target.destination.close()


async def post(database_url: str, contents: Sequence[bytes]) -> list[dict[str, Any]]:
    """Post signed bodies to a receiver's callback; return its answers."""
    app = create_app(Settings.load(database_url=database_url, clipia_webhook_secret=SECRET), worker=False)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://receiver") as client,
    ):
        answers = [
            await client.post("/clipia/webhook", content=each, headers=signed(each)) for each in contents
        ]
    assert [answer.status_code for answer in answers] == [200] * len(contents)
    return [answer.json() for answer in answers]


async def test_odd_bodies_are_events(
    world: World, database_url: str, cdn: str, kinds: dict[str, Kind]
) -> None:
    """B7, B8, B9: accepted, stored byte for byte, media saved, and forwarded with a list of differences."""
    bodies: dict[str, bytes] = {}
    for number, (name, (value, _, _)) in enumerate(ODD.items()):
        output = b'{"images":[{"url":"%b/sandbox/sample-image.png"}],"odd":%b}' % (cdn.encode(), value)
        bodies[f"r-{number}"] = (b"\xef\xbb\xbf" if name.startswith("B7") else b"") + (
            b'{"request_id":"r-%d","status":"OK","payload":{"model":"m","output":%b,"cost":12},"extra":%b}'
            % (number, output, value)
        )
    first = await post(database_url, [*bodies.values()])
    again = await post(database_url, [*bodies.values()])
    assert [answer["status"] for answer in first] == ["accepted"] * len(bodies)
    assert [answer["status"] for answer in again] == ["duplicate"] * len(bodies)
    async with world.working():
        await world.until_states(deliveries, delivered=len(bodies) * len(kinds))
    assert await world.states(media) == {"stored": len(bodies)}
    assert {row["request_id"]: row["body"] for row in await world.rows(events)} == bodies
    assert [row["body"] for row in await world.rows(all_receipts)] == [None] * 2 * len(bodies)
    for kind in kinds.values():
        found = {message["subject"]: message["data"] for message in await kind.received()}
        assert found.keys() == bodies.keys()
        for request_id, (name, (_, value, altered)) in zip(bodies, ODD.items(), strict=True):
            data = found[request_id]
            assert data.get("altered", []) == altered, name
            assert (data["model"], data["cost"], data["media"][0]["state"]) == ("m", 12, "stored")
            if not name.endswith("levels"):
                assert repr(data["output"]["odd"]) == repr(value), name
            assert json.dumps(data["output"]["odd"]).count("[") == ODD[name][0].count(b"["), name


async def test_odd_models_and_errors_are_kept(
    world: World, database_url: str, kinds: dict[str, Kind]
) -> None:
    """B9: text columns are repaired, too, and a body without odd characters has no list of differences."""
    bodies = [
        b'{"request_id":"r-1","status":"OK","payload":{"model":"m\\u0000\\ud83d","cost":12.0}}',
        b'{"request_id":"r-2","status":"ERROR","error":{"code":"X\\u0000","message":"\xff"}}',
        b'{"request_id":"r-3","status":"OK","payload":{"model":"m","output":{"seed":1}}}',
        '{"request_id":"r-é/😀:4","status":"OK"}'.encode(),
        b'{"request_id":"%b","status":"OK"}' % (b"r" * 255),
    ]
    assert {each["status"] for each in await post(database_url, bodies)} == {"accepted"}
    async with world.working():
        await world.until_states(deliveries, delivered=len(bodies) * len(kinds))
    assert [(row["model"], row["cost"]) for row in await world.rows(events)][:2] == [
        ("m\ufffd\ufffd", 12),
        (None, None),
    ]
    for kind in kinds.values():
        found = {message["subject"]: message["data"] for message in await kind.received()}
        assert found.keys() == {"r-1", "r-2", "r-3", "r-é/😀:4", "r" * 255}
        assert (found["r-1"]["model"], found["r-1"]["altered"]) == ("m\ufffd\ufffd", ["/model"])
        assert found["r-2"]["error"] == {"code": "X\ufffd", "message": "\ufffd"}
        assert found["r-2"]["altered"] == ["/error/code", "/error/message"]
        assert "altered" not in found["r-3"]


async def test_odd_bodies_conflict_only_if_they_differ(world: World, database_url: str) -> None:
    """C9: the same odd result in another spelling is a duplicate; another result is a conflict."""
    first = b'{"request_id":"r-1","status":"OK","payload":{"output":{"a":NaN,"b":"\\ud83d"}}}'
    same = b'{"status":"OK", "request_id":"r-1","payload":{"output":{"b":"\\uD83D", "a":NaN}}}'
    others = [
        first.replace(b"NaN", b"null"),
        first.replace(b"NaN", b'1e400,"c":1'),
        first.replace(b'"\\ud83d"', b"[" * 100_000 + b"]" * 100_000),
    ]
    answers = await post(database_url, [first, first, same, *others])
    statuses = [answer["status"] for answer in answers]
    assert statuses == ["accepted", "duplicate", "duplicate", "conflict", "conflict", "conflict"]
    kept = [row["body"] for row in await world.rows(all_receipts) if row["outcome"] == "conflict"]
    assert kept == others
