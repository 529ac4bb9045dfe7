"""G8: a secret in any setting, well-formed or mistyped, appears in no output."""

import asyncio
import base64
import json
import sqlite3
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
import pytest_asyncio
from support.clipia import MODEL, OddClipia, refused
from support.collector import Collector
from support.commands import ReceiverProcess, run_command
from support.echoing import amqp_repeats, assert_hidden, http_repeats, listening, nats_repeats, redis_repeats
from support.payloads import body, signed
from support.servers import free_port

from receiver.cli import main

CANARY = "cAnArY8f3b61d2e9b7c4"
CLOSED = free_port()

SETTINGS = {
    "CLIPIA_KEY": "clipia_live_{}",
    "CLIPIA_WEBHOOK_SECRET": "whsec_{}",
    "CLIPIA_RETIRED_WEBHOOK_SECRET": "whsec_{}",
    "CLIPIA_BASE_URL": "https://user:{}@127.0.0.1",
    "RECEIVER_DATABASE_URL": f"postgresql://user:{{}}@127.0.0.1:{CLOSED}/name",
    "RECEIVER_DATABASE_URL 2": "{}",
    "RECEIVER_DATABASE_URL 3": f"postgresql://user@127.0.0.1:{CLOSED}/name?{{}}=1&sslmode={{}}",
    "RECEIVER_STORAGE_URL": "s3://user:{}@bucket/prefix",
    "RECEIVER_STORAGE_URL 2": f"s3://bucket?endpoint=http://user:{{}}@127.0.0.1:{CLOSED}&region=x",
    "RECEIVER_STORAGE_URL 3": "{}",
    "RECEIVER_PUBLIC_URL": "https://user:{}@hooks.example.com",
    "RECEIVER_MEDIA_HOSTS": "media.example.com,https://user:{}@media.example.com",
    "RECEIVER_API_TOKENS": "ops:{0}{0}:read",
    "RECEIVER_API_TOKENS 2": "{0}{0}:ops",
    "RECEIVER_API_TOKENS 3": "{0}",
    "RECEIVER_BUDGETS": "{0}",
    "RECEIVER_CONFIG": "{}",
    "RECEIVER_LOG_LEVEL": "{}",
    "RECEIVER_DESTINATIONS": "{}",
    "RECEIVER_DESTINATION_URL": "{}",
    "RECEIVER_DESTINATION_URL 2": "{}://host",
    "RECEIVER_DESTINATION_URL http": f"http://user:{{}}@127.0.0.1:{CLOSED}/in?key={{}}",
    "RECEIVER_DESTINATION_URL amqp": f"amqp://user:{{}}@127.0.0.1:{CLOSED}/?queue=q",
    "RECEIVER_DESTINATION_URL redis": f"redis://user:{{}}@127.0.0.1:{CLOSED}/0?stream=s",
    "RECEIVER_DESTINATION_URL nats": f"nats://{{}}@127.0.0.1:{CLOSED}?subject=s.x",
    "RECEIVER_DESTINATION_URL kafka": f"kafka://user:{{}}@127.0.0.1:{CLOSED}/topic?security=sasl_plain",
    "RECEIVER_DESTINATION_URL sqs": "sqs://user:{}@sqs.eu-west-1.amazonaws.com/123456789012/q",
    "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://user:{{}}@127.0.0.1:{CLOSED}",
    "OTEL_EXPORTER_OTLP_HEADERS": "api-key={}",
    "AWS_SECRET_ACCESS_KEY": "{}",
    "AWS_SESSION_TOKEN": "{}",
}
MALFORMED = {
    "as it is": "{}",
    "line feed at the end": "{}\n",
    "space at the start": " {}",
    "line feed inside": "{}\n{}",
    "space inside": "{} {}",
    "tab inside": "{}\t{}",
    "escape inside": "{}\x1b{}",
    "not ASCII": "{}é{}",
    "not UTF-8": "{}\udcff{}",
    "slash and at": "{}/@#{}",
    "percent": "{}%0A%zz{}",
    "query": "{}?{}=x&y",
}


class _Refusal(BaseHTTPRequestHandler):
    """Answers 401 and repeats the key."""

    def do_GET(self) -> None:
        """Answer 401."""
        error = {"code": "invalid_api_key", "message": f"not {self.headers['authorization']}"}
        content = json.dumps({"error": error}).encode()
        self.send_response(401)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log no requests."""


@pytest.fixture(scope="module")
def clipia() -> Iterator[str]:
    """A Clipia that refuses every key. It runs in a thread: the commands have their own event loop."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusal) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_command_shows_a_mistyped_secret(
    setting: str, clipia: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """G8: if a secret is invalid, `check` and the other commands show no half of it."""
    name = setting.partition(" ")[0]
    monkeypatch.setenv("CLIPIA_BASE_URL", clipia)
    if name.startswith("AWS_"):
        monkeypatch.setenv("RECEIVER_STORAGE_URL", f"s3://bucket?endpoint=http://127.0.0.1:{CLOSED}&region=x")
    if name.startswith("OTEL_"):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{CLOSED}")
        # The library would try again for seconds.
        monkeypatch.setattr("receiver.tracing.sdk.CHECK_SECONDS", 0.1)
    half = len(CANARY) // 2
    for kind, form in MALFORMED.items():
        parts = (CANARY,) if form.count("{}") == 1 else (CANARY[:half], CANARY[half:])
        value = SETTINGS[setting].replace("{0}", "{}").replace("{}", form.format(*parts))
        quoted = (f'"{value}"', f"{value}\n") if kind == "as it is" else ()
        for typed in (value, *quoted):
            monkeypatch.setenv(name, typed)
            printed = (
                run(["check"], monkeypatch) + run(["settings"], monkeypatch) + run(["account"], monkeypatch)
            )
            out, err = capsys.readouterr()
            assert "Traceback" not in printed + out + err, (kind, printed[-3000:], out, err)
            assert_hidden(printed + out + err, CANARY)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a command in this process; return the traceback of an exception that it does not catch."""
    monkeypatch.setattr(sys, "argv", ["receiver", *arguments])
    try:
        main()
    except SystemExit:
        return ""
    except BaseException:  # noqa: BLE001 - the test needs every traceback
        return traceback.format_exc()
    return ""


# Well-formed secrets, and peers that refuse them and repeat them.

SECRETS = {
    "key": "kEyCaNaRy0a1b2c3d4e5",
    "webhook": "wHsEcCaNaRy6f7a8b9c0",
    "token": "tOkEnCaNaRy1d2e3f4a5",
    "password": "pAsSwOrD8f3b61d2e9b7",
    "collector": "cOlLeCtOr7a8b9c0d1e2",
    "signing": base64.b64encode(b"sIgNiNgCaNaRy1d2e3f4a5b6c7d8e9").decode(),
}
CONFIG = """
[[destinations]]
name = "http"
url = "http://user:${{PASSWORD}}@127.0.0.1:{http}/in?key=${{PASSWORD}}"
secret = "whsec_{signing}"
[[destinations]]
name = "redis"
url = "redis://user:${{PASSWORD}}@127.0.0.1:{redis}/0?stream=s"
[[destinations]]
name = "nats"
url = "nats://user:${{PASSWORD}}@127.0.0.1:{nats}?subject=s.x"
[[destinations]]
name = "amqp"
url = "amqp://user:${{PASSWORD}}@127.0.0.1:{amqp}/?queue=q"
"""


@dataclass(frozen=True)
class Traces:
    """The output of a receiver whose peers repeat its secrets."""

    log: str
    answers: str
    commands: str
    database: str
    spans: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """A receiver at level DEBUG has served requests, commands have queried it, and it has ended."""
    folder = tmp_path_factory.mktemp("canaries")
    key = f"clipia_live_{SECRETS['key']}"
    repeated = (
        f"no, not {key}; Authorization: Bearer {key}; {base64.b64encode(key.encode()).decode()}; {key[:24]}"
    )
    async with AsyncExitStack() as stack:
        peers = {"http": http_repeats, "redis": redis_repeats, "nats": nats_repeats, "amqp": amqp_repeats}
        ports = {
            name: await stack.enter_async_context(listening(talk, seconds=60)) for name, talk in peers.items()
        }
        odd = await stack.enter_async_context(OddClipia().listening())
        odd.script = [
            refused(503, "service_unavailable", repeated),
            refused(400, "invalid_request", repeated),
        ]
        odd.others = lambda _request: refused(401, "invalid_api_key", repeated)
        collector = stack.enter_context(Collector())
        (folder / "receiver.toml").write_text(CONFIG.format(**ports, signing=SECRETS["signing"]))
        receiver = ReceiverProcess(
            folder,
            RECEIVER_LOG_LEVEL="DEBUG",
            RECEIVER_API_TOKENS=f"canary:{SECRETS['token']}\n",
            CLIPIA_KEY=f"{key}\n",
            CLIPIA_WEBHOOK_SECRET=f" whsec_{SECRETS['webhook']}\n",
            CLIPIA_BASE_URL=f"{odd.url}\n",
            PASSWORD=f"{SECRETS['password']}\n",
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            OTEL_EXPORTER_OTLP_HEADERS=f"api-key={SECRETS['collector']}",
        )
        await asyncio.to_thread(receiver.start)
        try:
            answers = await leave_traces(receiver)
            commands = "".join([await asyncio.to_thread(command, receiver, line) for line in COMMANDS])
        finally:
            await asyncio.to_thread(receiver.stop)
    with closing(sqlite3.connect(folder / "receiver.db")) as connection:
        dump = "\n".join(connection.iterdump())
    spans = "\n".join(each.texts() for each in collector.spans)
    log = receiver.log.read_text()
    return Traces(log=log, answers=answers, commands=commands, database=dump, spans=spans)


COMMANDS = (
    "check",
    "settings",
    "settings --json",
    "account",
    "models",
    "jobs list --json",
    "jobs list",
    "events list --json",
    "events export -",
    "deliveries list --json",
    "deliveries list",
    "submit nano-banana-2 --input {} --idempotency-key by-command",
)


def command(receiver: ReceiverProcess, line: str) -> str:
    """Run a command beside the receiver; return its whole output."""
    done = run_command(*line.split(), settings=receiver.settings, cwd=receiver.folder)
    return f"$ {line}\n{done.stdout.decode()}{done.stderr.decode()}"


async def leave_traces(receiver: ReceiverProcess) -> str:
    """Send a webhook and jobs, wait until all peers have refused, and return all answers."""
    headers = {"Authorization": f"Bearer {SECRETS['token']}"}
    async with httpx.AsyncClient(base_url=receiver.url, headers=headers, verify=False, timeout=60) as client:
        webhook = body("r-1", payload={"model": MODEL, "output": {}})
        stored = await client.post(
            "/clipia/webhook", content=webhook, headers=signed(webhook, secret=f"whsec_{SECRETS['webhook']}")
        )
        assert stored.status_code == 200, stored.text
        job = {"model": MODEL, "input": {"prompt": "a cat"}}
        answers = [stored]
        for number in range(2):
            answers += [await client.post("/v1/jobs", json=job, headers={"Idempotency-Key": f"k-{number}"})]
        deadline = time.monotonic() + 90
        while True:
            deliveries = await client.get("/v1/deliveries")
            refusals = [each for each in deliveries.json()["data"] if each["error"]]
            if len(refusals) == 4:
                break
            assert time.monotonic() < deadline, deliveries.text
            await asyncio.sleep(0.2)
        event_id = stored.json()["event_id"]
        job_ids = [each.json()["id"] for each in answers[1:] if "id" in each.json()]
        job_ids += [each.json()["job_id"] for each in answers[1:] if "job_id" in each.json()]
        paths = ["/v1/jobs", *(f"/v1/jobs/{each}" for each in job_ids), "/v1/account", "/v1/models"]
        paths += [
            "/v1/events",
            f"/v1/events/{event_id}",
            "/metrics",
            "/readyz",
            "/v1/replays",
            "/v1/settings",
        ]
        answers += [deliveries, *[await client.get(path) for path in paths]]
    return "\n".join(f"{each.request.url} {each.status_code} {each.headers} {each.text}" for each in answers)


@pytest.fixture(params=["log", "answers", "commands", "database", "spans"])
def place(request: pytest.FixtureRequest) -> str:
    """Every output that could contain a secret."""
    return str(request.param)


def test_no_secret_that_a_peer_repeats_comes_out(traces: Traces, place: str) -> None:
    """G8: Clipia and four destinations repeat the requests, and no half of a secret comes out."""
    text = getattr(traces, place)
    assert_hidden(text, *SECRETS.values())


def test_the_peers_were_quoted(traces: Traces) -> None:
    """G8: their words are in rows, answers and logs, with the secrets masked."""
    for place in (traces.log, traces.answers, traces.commands, traces.database):
        assert "[masked]" in place
    for name in ("http", "redis", "nats", "amqp"):
        assert f"send {name}" in traces.spans
        assert f'"{name}"' in traces.answers
    assert "submit to Clipia" in traces.spans
    assert "unknown command" in traces.answers
    assert "Not welcome" in traces.answers
    assert "ACCESS_REFUSED" in traces.answers
    assert json.dumps("invalid_request") in traces.answers
