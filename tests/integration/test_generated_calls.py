"""Generated calls of every operation: each answer is as the specification says, and none is a 5xx."""

import asyncio
import hashlib
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.events import World, opened, plain, with_files
from support.media import chunked
from support.payloads import SECRET, failure, signed
from support.serving import serving
from support.specification import closed, read_specification

from receiver.app import create_app
from receiver.db.database import Database
from receiver.db.tables import deliveries, events, media
from receiver.sandbox import WITHOUT_LIMITS, SandboxOptions, running
from receiver.sandbox import create_app as create_sandbox
from receiver.settings import Settings

TOKEN = "everything-0123456789abcdef"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
MODEL = "nano-banana-2"
LONGEST_WAIT = 0.01


@dataclass(frozen=True)
class Served:
    """A receiver with rows of each kind, and ids of some of them by operation."""

    url: str
    ids: Mapping[str, str]
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})


@asynccontextmanager
async def filled(database_url: str, folder: Path) -> AsyncIterator[Served]:
    """Serve a receiver."""
    options = SandboxOptions(duration=60, **WITHOUT_LIMITS)
    async with running(create_sandbox(options, secret=SECRET)) as clipia:
        app = create_app(
            Settings.load(
                database_url=database_url,
                storage_url=f"file:{folder / 'media'}",
                clipia_webhook_secret=SECRET,
                clipia_key="clipia_live_x",
                clipia_base_url=clipia,
                api_tokens=f"all:{TOKEN}",
                destinations=[{"name": "orders", "url": f"file:{folder / 'events.jsonl'}"}],
            ),
            worker=False,
        )
        database = Database(database_url)
        async with serving(app) as url, opened(database, folder / "media") as world:
            world.add_destination("orders")
            await world.add_history(*(plain(f"r-{number}") for number in range(3)), failure("r-3"))
            await world.change(deliveries, deliveries.c.event_seq == 1, state="dead", error="refused")
            file_id = await store_file(world)
            served = Served(url, {})
            async with httpx.AsyncClient(base_url=url, headers=served.headers) as client:
                ids = await fill(client)
            yield Served(url, ids | {"GET /v1/media/{id}": file_id})
        await database.close()


async def store_file(world: World) -> str:
    """Store an event with a file; return the file's id."""
    await world.add(with_files("https://media.clipia.ai", "r-4", "/works/a.png"))
    await world.fan_out()
    (file,) = await world.rows(media)
    await world.storage.put("aa/0-image.png", chunked(b"image"))
    values = {
        "state": "stored",
        "next_attempt_at": None,
        "size": 5,
        "sha256": hashlib.sha256(b"image").hexdigest(),
        "content_type": "image/png",
        "storage_key": "aa/0-image.png",
        "uri": world.storage.uri("aa/0-image.png"),
    }
    await world.change(media, **values)
    await world.change(events, events.c.state == "fetching", state="ready")
    return str(file["id"])


async def fill(client: httpx.AsyncClient) -> dict[str, str]:
    """Make receipts, jobs and a replay; return the ids that calls take."""
    for content in (plain("r-0"), plain("r-0", model="other"), plain("r-9"), b"strange"):
        (await client.post("/clipia/webhook", content=content, headers=signed(content))).raise_for_status()
    job = {"model": MODEL, "input": {"prompt": "a cat"}, "metadata": {"order": "1"}}
    jobs = [(await client.post("/v1/jobs", json=job)).json()["id"] for _ in range(3)]
    (await client.post(f"/v1/jobs/{jobs[0]}/cancel")).raise_for_status()
    replay = (await client.post("/v1/replays", json={"all": True})).json()["id"]
    (dead,) = (await client.get("/v1/deliveries?state=dead")).json()["data"]
    assert (await client.post("/clipia/webhook", content=b"unsigned")).status_code == 401
    rejected: list[Any] = []
    async with asyncio.timeout(30):
        while not rejected:
            await asyncio.sleep(0.05)
            rejected = (await client.get("/v1/rejections")).json()["data"]
    return {
        "POST /v1/jobs/{id}/resubmit": jobs[0],
        "POST /v1/jobs/{id}/cancel": jobs[1],
        "GET /v1/jobs/{id}": jobs[2],
        "DELETE /v1/events/{id}": "r-2",
        "GET /v1/events/{id}": "r-0",
        "GET /v1/explain/{id}": "r-0",
        "GET /v1/events/{id}/receipts": "r-0",
        "POST /v1/events/{id}/receipts/{seq}/promote": "r-0",
        "POST /v1/events/{id}/replay": "r-1",
        "GET /v1/events/{id}/route": "r-0",
        "GET /v1/events/{id}/links": "r-0",
        "POST /v1/events/{id}/give-up": "r-0",
        "POST /v1/deliveries/{id}/retry": dead["id"],
        "POST /v1/deliveries/{id}/discard": dead["id"],
        "GET /v1/deliveries/{id}": dead["id"],
        "GET /v1/deliveries/{id}/message": dead["id"],
        "GET /v1/replays/{id}": replay,
        "POST /v1/replays/{id}/cancel": replay,
        "GET /v1/rejections/{id}": str(rejected[0]["id"]),
    }


@pytest.fixture(scope="module")
def served(migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A receiver in a thread of its own: generated calls are made without an event loop."""
    folder = tmp_path_factory.mktemp("generated")
    path = folder / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    found: Future[tuple[Served, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        async with filled(f"sqlite:///{path}", folder) as made:
            ended = asyncio.Event()
            found.set_result((made, asyncio.get_running_loop(), ended))
            await ended.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if not found.done():
                found.set_exception(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    made, loop, ended = found.result(timeout=30)
    yield made
    loop.call_soon_threadsafe(ended.set)
    thread.join(timeout=30)
    assert not thread.is_alive()


def shorten_waits(value: Any) -> None:
    """Lower the greatest `wait` of all calls."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        shorten_waits(each)
    if isinstance(value, dict):
        found = value.get("schema") if value.get("name") == "wait" else value.get("wait")
        if isinstance(found, dict):
            found["maximum"] = LONGEST_WAIT


# No answer may have a field that the specification does not name, and no call waits for long.
with tempfile.TemporaryDirectory() as made_by_import:
    DOCUMENT = closed(read_specification(Path(made_by_import)))
shorten_waits(DOCUMENT)
CALLS = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {
    result.ok().label: result.ok() for result in CALLS.get_all_operations() if isinstance(result, Ok)
}
# The library's own decorator gives all operations one node id on pytest 9.2, and xdist would run one of them.


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_generated_calls_are_answered_as_specified(name: str, served: Served) -> None:
    """G1: for any input, the status is documented and the answer fits its schema."""
    operation = OPERATIONS[name]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @settings(
        max_examples=24,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=cases)
    def check(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(base_url=served.url, headers=served.headers, checks=CHECKS)

    check()


async def test_documented_examples_are_answered_as_specified(migrated_sqlite: Path, tmp_path: Path) -> None:
    """The example of each call's body, sent for an object that exists, is carried out."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    # Before a replay ends, its events cannot be erased; another call retries all dead letters.
    first = (
        *("POST /v1/replays/{id}/cancel", "DELETE /v1/events/{id}", "POST /v1/deliveries/{id}/retry"),
        *("POST /v1/freeze", "DELETE /v1/freeze"),
    )
    names = [name for name in (*first, *sorted(OPERATIONS.keys() - {*first})) if "/clipia/" not in name]
    async with (
        filled(f"sqlite:///{path}", tmp_path) as served,
        httpx.AsyncClient(base_url=served.url, headers=served.headers) as client,
    ):
        for name in names:
            operation = OPERATIONS[name]
            method, place = name.split()
            body = operation.definition.raw.get("requestBody")
            content: Any = None if body is None else body["content"]["application/json"]["example"]
            if name == "POST /v1/jobs":
                content = {**content, "wait": LONGEST_WAIT}
            if name == "POST /v1/events/fetch":
                content = {"request_id": "r-0"}
            place = place.replace("{id}", served.ids.get(name, "")).replace("{slug}", MODEL)
            place = place.replace("{name}", "orders").replace("{seq}", "2")
            response = await client.request(method, place, json=content)
            assert response.is_success, (name, response.text)
            operation.validate_response(response)
