"""Traces across processes: a sandbox, receivers, destinations, and a collector that takes spans."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import orjson
import pytest
from support.collector import Collector, Received
from support.commands import ReceiverProcess, always, run_command
from support.jobs import TOKEN, Sandbox, forwarded, job_receiver, wait_until_done
from support.payloads import failure, signed
from support.servers import Postgres

from receiver.core.trace_context import computed_ids
from receiver.db.rows import event_id

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"
SPEECH: dict[str, Any] = {"model": "gemini-3-1-flash-tts", "input": {"prompt": "a cat"}}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Return a sandbox for all tests of this file."""
    with Sandbox(tmp_path_factory.mktemp("sandbox"), duration=0.1) as found:
        yield found


def submit(receiver: ReceiverProcess, key: str, headers: Sequence[tuple[str, str]] = ()) -> str:
    """Submit a job over HTTP and return its id."""
    given = [("authorization", f"Bearer {TOKEN}"), ("idempotency-key", key), *headers]
    response = httpx.post(f"{receiver.url}/v1/jobs", json=SPEECH, headers=given, trust_env=False, timeout=60)
    assert response.status_code in (200, 201, 202), response.text
    return str(response.json()["id"])


def test_a_callers_trace_is_passed_on_without_tracing(sandbox: Sandbox, tmp_path: Path) -> None:
    """The message of a job has the `traceparent` of its submission, with no extra and no collector."""
    with job_receiver(tmp_path / "receiver", sandbox) as receiver:
        wanted = {
            submit(
                receiver, "traced", [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]
            ): (
                PARENT,
                "a=1,b=2",
            ),
            submit(receiver, "plain"): (None, None),
            submit(receiver, "doubled", [("traceparent", PARENT), ("traceparent", PARENT)]): (None, None),
            submit(receiver, "invalid", [("traceparent", PARENT.upper())]): (None, None),
        }
        # The first submission of a key decides.
        submit(receiver, "traced", [("traceparent", f"00-{'1' * 32}-{SPAN}-01")])
        wait_until_done(receiver.settings["RECEIVER_DATABASE_URL"])
        messages = forwarded(tmp_path / "receiver")
        sent = {
            each["data"]["job"]["id"]: (each.get("traceparent"), each.get("tracestate")) for each in messages
        }
        assert sent == wanted


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Return a collector."""
    with Collector() as found:
        yield found


def tracing(collector: Collector, **variables: str) -> dict[str, str]:
    """Return the variables that turn tracing on."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        **variables,
    }


@contextmanager
def site(folder: Path, sandbox: Sandbox, collector: Collector, **settings: str) -> Iterator[ReceiverProcess]:
    """Run a web process and a worker, with a file and an HTTP destination in binary mode."""
    folder.mkdir()
    (folder / "receiver.toml").write_text(
        f'[[destinations]]\nname = "sink"\nurl = "{collector.url}/events"\nbinary = true\n'
    )
    web = job_receiver(folder, sandbox, **settings)
    web.arguments = [*web.arguments, "--no-worker"]
    worker = ReceiverProcess(folder, "worker", **web.settings)
    with ExitStack() as stack:
        stack.enter_context(web)
        stack.enter_context(worker)
        yield web


def by_name(spans: Sequence[Received], trace: str) -> dict[str, list[Received]]:
    """Return the spans of a trace by their names."""
    found: dict[str, list[Received]] = {}
    for each in spans:
        if each.trace_id == trace:
            found.setdefault(each.name, []).append(each)
    return found


def only(spans: dict[str, list[Received]], name: str) -> Received:
    """Return the single span of a name."""
    assert len(spans.get(name, [])) == 1, {name: len(each) for name, each in spans.items()}
    return spans[name][0]


def test_one_trace_from_submission_to_each_destination(
    sandbox: Sandbox, collector: Collector, tmp_path: Path
) -> None:
    """The spans of all processes about a job are one tree, and its messages have their places in it."""
    with site(tmp_path / "receiver", sandbox, collector, **tracing(collector)) as web:
        job_id = submit(web, "traced", [("traceparent", PARENT), ("tracestate", "a=1")])
        spans = collector.wait_for(lambda spans: len(by_name(spans, TRACE).get("UPDATE deliveries", ())) == 2)
        (message,) = forwarded(tmp_path / "receiver")
    found = by_name(spans, TRACE)
    submitted, received = only(found, "submit job"), only(found, "receive event")
    assert submitted.parent == SPAN
    assert received.parent == submitted.span_id
    called, downloaded = only(found, "submit to Clipia"), only(found, "download file")
    to_file, to_sink = only(found, "send default"), only(found, "send sink")
    parents = {
        "INSERT jobs": [submitted.span_id],
        "submit to Clipia": [submitted.span_id],
        "UPDATE jobs": [called.span_id],
        "fan out": [received.span_id],
        "download file": [received.span_id],
        "UPDATE media": [downloaded.span_id],
        "send default": [received.span_id],
        "send sink": [received.span_id],
        "UPDATE deliveries": [to_file.span_id, to_sink.span_id],
    }
    assert {name: sorted(each.parent for each in found[name]) for name in parents} == {
        name: sorted(ids) for name, ids in parents.items()
    }
    assert not [each.name for each in spans if each.failed]
    # The web process submits; the worker does the rest.
    assert {each.service["service.name"] for each in spans} == {"clipia-receiver"}
    web_process, worker = (each.service["process.pid"] for each in (submitted, received))
    assert web_process != worker
    by_web = {each.name for each in spans if each.service["process.pid"] == web_process}
    assert by_web == {"submit job", "INSERT jobs", "submit to Clipia", "UPDATE jobs"}
    assert submitted.attributes["clipia.job.id"] == received.attributes["clipia.job.id"] == job_id
    assert received.attributes["clipia.event.id"] == message["id"]
    assert to_file.attributes["clipia.delivery.id"] == message["deliveryid"]
    assert submitted.began <= called.began <= called.ended <= submitted.ended
    # The messages have the places of their own attempts.
    assert (message["traceparent"], message["tracestate"]) == (f"00-{TRACE}-{to_file.span_id}-01", "a=1")
    ((headers, _),) = collector.posts
    parent = f"00-{TRACE}-{to_sink.span_id}-01"
    assert headers["traceparent"] == headers["ce-traceparent"] == parent
    assert headers["tracestate"] == "a=1"


def test_a_webhook_without_a_job_begins_a_trace(
    sandbox: Sandbox, collector: Collector, tmp_path: Path
) -> None:
    """Its trace is computed from the event, whatever `traceparent` its request has."""
    with site(tmp_path / "receiver", sandbox, collector, **tracing(collector)) as web:
        content = failure("request-1")
        headers = signed(content) | {"traceparent": PARENT, "tracestate": "a=1"}
        url = f"{web.url}/clipia/webhook"
        response = httpx.post(url, content=content, headers=headers, trust_env=False, timeout=60)
        assert response.status_code == 200
        event = event_id("clipia", "request-1")
        assert response.json()["event_id"] == str(event)
        trace, root = computed_ids(event)
        spans = collector.wait_for(
            lambda spans: len(by_name(spans, f"{trace:032x}").get("UPDATE deliveries", ())) == 2
        )
        (message,) = forwarded(tmp_path / "receiver")
    assert {each.trace_id for each in spans} == {f"{trace:032x}"}
    found = by_name(spans, f"{trace:032x}")
    received = only(found, "receive event")
    assert (received.parent, received.span_id) == ("", f"{root:016x}")
    # The web process stored it, before any process knew more of it than its id.
    assert only(found, "INSERT events").parent == received.span_id
    sent = only(found, "send default")
    # Bit 1: the trace id is random.
    assert message["traceparent"] == f"00-{trace:032x}-{sent.span_id}-03"
    assert "tracestate" not in message


def test_a_command_begins_a_trace_and_polls_continue_it(
    sandbox: Sandbox, collector: Collector, tmp_path: Path
) -> None:
    """`receiver submit` makes the first spans of its job; without a webhook, polls find the result."""
    sandbox.change(webhook_loss_rate=1.0)
    settings = tracing(collector, RECEIVER_POLL_AFTER="1")
    with (
        always(lambda: sandbox.change(webhook_loss_rate=0.0)),
        site(tmp_path / "receiver", sandbox, collector, **settings) as web,
    ):
        line = ["submit", SPEECH["model"], "--input", '{"prompt": "a cat"}', "--json"]
        done = run_command(*line, settings=web.settings, cwd=web.folder)
        assert done.returncode == 0, done.stderr
        job_id = orjson.loads(done.stdout)["id"]
        trace, root = (
            f"{each:0{size}x}" for each, size in zip(computed_ids(UUID(job_id)), (32, 16), strict=True)
        )
        spans = collector.wait_for(
            lambda spans: len(by_name(spans, trace).get("UPDATE deliveries", ())) == 2, seconds=60
        )
    found = by_name(spans, trace)
    submitted, received = only(found, "submit job"), only(found, "receive event")
    assert (submitted.parent, submitted.span_id, received.parent) == ("", root, root)
    last = max(found["poll Clipia"], key=lambda each: each.began)
    assert {each.parent for each in found["poll Clipia"]} == {root}
    assert only(found, "INSERT events").parent == last.span_id
    assert only(found, "send sink").parent == received.span_id


def test_each_web_process_exports_its_spans(collector: Collector, tmp_path: Path, postgres: Postgres) -> None:
    """With `--workers 2`, the spans of both processes arrive, those of the last moment included."""
    receiver = ReceiverProcess(
        tmp_path,
        *("serve", "--port", "0", "--workers", "2"),
        RECEIVER_DATABASE_URL=postgres.url(template="migrated"),
        RECEIVER_DESTINATION_URL=f"file:{tmp_path / 'events.jsonl'}",
        # Only the end of a process exports.
        **tracing(collector, OTEL_BSP_SCHEDULE_DELAY="600000"),
    )
    wanted = {f"{computed_ids(event_id('clipia', f'request-{number}'))[0]:032x}" for number in range(40)}
    with receiver:
        for number in range(40):
            content = failure(f"request-{number}")
            url = f"{receiver.url}/clipia/webhook"
            # The processes may still start.
            answer = httpx.post(url, content=content, headers=signed(content), trust_env=False, timeout=60)
            assert answer.status_code == 200
        wait_until_done(receiver.settings["RECEIVER_DATABASE_URL"])
        assert receiver.stop() == 0
    for name in ("receive event", "INSERT events", "send default"):
        found = [each for each in collector.spans if each.name == name]
        assert {each.trace_id for each in found} == wanted, name
        assert len(found) == 40
    assert len({each.service["process.pid"] for each in collector.spans}) == 2


def test_sampling_is_that_of_the_caller(sandbox: Sandbox, collector: Collector, tmp_path: Path) -> None:
    """A trace whose caller does not sample it has no spans and goes on; others are sampled by our ratio."""
    variables = tracing(
        collector, OTEL_TRACES_SAMPLER="parentbased_traceidratio", OTEL_TRACES_SAMPLER_ARG="0.5"
    )
    with site(tmp_path / "receiver", sandbox, collector, **variables) as web:
        quiet, loud = (f"00-{digit * 32}-{SPAN}-{flags}" for digit, flags in (("a", "02"), ("b", "03")))
        ids = {submit(web, parent, [("traceparent", parent)]): parent for parent in (quiet, loud)}
        plain = [submit(web, f"plain-{number}") for number in range(8)]
        wait_until_done(web.settings["RECEIVER_DATABASE_URL"])
        messages = {
            each["data"]["job"]["id"]: each["traceparent"] for each in forwarded(tmp_path / "receiver")
        }
        sampled = {each for each in plain if computed_ids(UUID(each))[0] % 2**64 < 2**63}
        wanted = {f"{computed_ids(UUID(each))[0]:032x}" for each in sampled} | {"b" * 32}

        def is_complete(spans: Sequence[Received]) -> bool:
            return wanted <= {each.trace_id for each in spans if each.name == "UPDATE deliveries"}

        spans = collector.wait_for(is_complete)
    assert {each.trace_id for each in spans} == wanted
    for job_id, parent in ids.items():
        assert messages[job_id].split("-")[1] == parent.split("-")[1]
        assert messages[job_id].endswith(parent[-3:])
    assert {each for each in plain if messages[each].endswith("-03")} == sampled
    assert {each for each in plain if messages[each].endswith("-02")} == set(plain) - sampled


@pytest.mark.parametrize("fault", ["down", "hangs", "fails"])
def test_a_collector_in_trouble_costs_no_event(
    sandbox: Sandbox, collector: Collector, tmp_path: Path, fault: str
) -> None:
    """Spans are lost with one log record of our own; webhooks are acked, SIGTERM ends in a few seconds."""
    variables = tracing(collector, OTEL_EXPORTER_OTLP_TIMEOUT="30")
    if fault == "down":
        variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    collector.hangs, collector.status = fault == "hangs", 200 if fault == "hangs" else 400
    with job_receiver(tmp_path / "receiver", sandbox, **variables) as receiver:
        for number in range(20):
            content = failure(f"request-{number}")
            url = f"{receiver.url}/clipia/webhook"
            began = time.monotonic()
            answer = httpx.post(url, content=content, headers=signed(content), trust_env=False, timeout=60)
            assert answer.status_code == 200
            assert time.monotonic() - began < 5
        wait_until_done(receiver.settings["RECEIVER_DATABASE_URL"])
        began = time.monotonic()
        assert receiver.stop() == 0
        assert time.monotonic() - began < 20
        records = [each for each in receiver.records() if "spans" in str(each["event"])]
        others = [each for each in receiver.records() if "opentelemetry" in str(each)]
    assert len(forwarded(tmp_path / "receiver")) == 20
    assert 1 <= len(records) <= 2, records
    assert not others
    text = receiver.log.read_text()
    assert "Failed to export" not in text
    assert "Transient error" not in text
    assert "Traceback" not in text


AT_EXIT = """
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path("modules.txt").write_text("\\n".join(sys.modules)))
"""


def test_off_without_the_variables(sandbox: Sandbox, tmp_path: Path) -> None:
    """Without a collector, the process imports nothing of OpenTelemetry, and messages name no trace."""
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    folder = tmp_path / "receiver"
    with job_receiver(folder, sandbox, PYTHONPATH=str(tmp_path), OTEL_SERVICE_NAME="other") as receiver:
        submit(receiver, "plain")
        wait_until_done(receiver.settings["RECEIVER_DATABASE_URL"])
    modules = (folder / "modules.txt").read_text().split()
    assert "receiver.tracing" in modules
    assert not [
        name for name in modules if name.startswith("opentelemetry") or name == "receiver.tracing.sdk"
    ]
    assert "traceparent" not in forwarded(folder)[0]
