"""Tracing: when it is on, what is needed for it, and what a broken collector costs."""

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from structlog.testing import capture_logs
from support.collector import Collector
from support.payloads import SECRET
from typer.testing import CliRunner

from receiver import tracing
from receiver.cli import app
from receiver.config_file import otlp_endpoint
from receiver.errors import ClipiaUnavailable, RefusedByClipia, SettingsError
from receiver.masking import mask
from receiver.settings import Settings
from receiver.tracing import OFF, error_type, require_tracing, sdk, start_tracing

URL = "http://127.0.0.1:4318"
SPANS_IN = ("lanes/spans.py", "lanes/base.py", "lanes/submit.py", "lanes/poll.py")
ON = {"OTEL_EXPORTER_OTLP_ENDPOINT": URL}


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Return a collector."""
    with Collector() as found:
        yield found


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, None),
        (ON, URL),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{URL}/x"}, f"{URL}/x"),
        (ON | {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{URL}/x"}, f"{URL}/x"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": " "}, None),
        (ON | {"OTEL_SDK_DISABLED": "TRUE"}, None),
        (ON | {"OTEL_SDK_DISABLED": "false"}, URL),
        (ON | {"OTEL_TRACES_EXPORTER": "none"}, None),
        (ON | {"OTEL_TRACES_EXPORTER": "otlp"}, URL),
        ({"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_EXPORTER": "otlp"}, None),
    ],
)
def test_tracing_is_on_if_a_collector_is_named(variables: dict[str, str], endpoint: str | None) -> None:
    """OpenTelemetry's own variables turn tracing on and off."""
    assert otlp_endpoint(variables) == endpoint


def test_another_protocol_is_an_error() -> None:
    """Spans to the port of gRPC would be lost without a word."""
    for name in ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"):
        with pytest.raises(SettingsError, match="http/protobuf"):
            require_tracing(ON | {name: "grpc"})
        require_tracing({name: "grpc"})
        require_tracing(ON | {name: "HTTP/protobuf "})


class _Missing:
    """Finds nothing of OpenTelemetry."""

    def find_spec(self, name: str, *_: object) -> None:
        """Raise the error of a package that is not installed."""
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name, name=name)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a collector and without the extra, `serve` and `worker` name it; a program's Submitter goes on."""
    for name in [name for name in sys.modules if name.startswith(("opentelemetry", "receiver.tracing.sdk"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(tracing, "sdk", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])
    require_tracing({})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", URL)
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", SECRET)
    for call in (require_tracing, start_tracing):
        with pytest.raises(SettingsError, match=r"clipia-receiver\[otel\]"):
            call()
    with capture_logs() as logs:
        assert start_tracing(is_optional=True) is OFF
    assert [each["event"] for each in logs] == ["no traces"]
    for command in ("serve", "worker"):
        monkeypatch.setattr(f"receiver.cli.{command}.configure_logging", lambda **_: None)
        result = CliRunner().invoke(app, [command])
        assert isinstance(result.exception, SettingsError)
        assert "clipia-receiver[otel]" in str(result.exception)


@pytest.mark.parametrize(
    ("status", "level", "words"),
    [
        (200, "ok", "takes spans"),
        (404, "error", "does not take spans"),
        (302, "error", "does not take spans"),
        (None, "ok", "off"),
    ],
)
def test_check_asks_the_collector(
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    status: int | None,
    level: str,
    words: str,
) -> None:
    """`receiver check` says whether tracing is on, and whether the collector takes spans."""
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    monkeypatch.setenv("CLIPIA_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("RECEIVER_DATABASE_URL", f"sqlite:///{tmp_path / 'receiver.db'}")
    monkeypatch.setenv("RECEIVER_STORAGE_URL", f"file:{tmp_path / 'media'}")
    if status is not None:
        collector.status = status
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.replace("//", "//user:hidden-1234@"))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=hidden-5678")
    result = CliRunner().invoke(app, ["check", "--json"])
    (found,) = [each for each in json.loads(result.stdout)["data"] if each["step"] == "traces"]
    assert found["level"] == level
    assert words in found["message"]
    assert "hidden" not in result.stdout
    assert [each["x-key"] for each in collector.headers] == (["hidden-5678"] if status else [])


def test_secrets_of_the_collector_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: the values of OTEL_EXPORTER_OTLP_HEADERS and the login of the endpoint are masked everywhere."""
    monkeypatch.setenv(
        "OTEL_EXPORTER_OTLP_HEADERS", "x-team=media, api-key=kEy-0a1b2c3d,auth=Basic%20cAnArY%3D%3D"
    )
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://user:pAsS-4e5f6a7b@collector:4318/x")
    Settings.load()
    quoted = mask("kEy-0a1b2c3d Basic cAnArY== Basic%20cAnArY%3D%3D pAsS-4e5f6a7b")
    assert not [part for part in ("0a1b", "cAnArY", "4e5f") if part in quoted], quoted


class _Scripted(SpanExporter):
    """An exporter with given results; without one it waits."""

    def __init__(self, *results: SpanExportResult) -> None:
        self.results = list(results)
        self.go_on = threading.Event()

    def export(self, spans: object) -> SpanExportResult:
        """Return the next result."""
        if not self.results:
            self.go_on.wait(10)
        return self.results.pop(0) if self.results else SpanExportResult.SUCCESS


def test_lost_spans_are_reported_once_a_minute() -> None:
    """A collector that is away for an hour makes 60 log records, and one when it is back."""
    failed, done = SpanExportResult.FAILURE, SpanExportResult.SUCCESS
    processor = sdk.LimitedProcessor(_Scripted(done, failed, failed, failed, done, done))
    tracer = sdk.SdkTracer(processor)
    with capture_logs() as logs:
        for wait in (0, 0, 0, sdk.REPORT_SECONDS, 0, 0):
            processor._next_report -= wait
            for _ in range(2):
                tracer.start("name", None).end()
            processor.force_flush()
    processor.shutdown()  # type: ignore[no-untyped-call]  # the library has no types for it
    assert [(each["log_level"], each["lost"]) for each in logs] == [
        ("warning", 2),
        ("warning", 6),
        ("info", 6),
    ]


async def test_a_full_queue_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans beyond the queue are lost and counted; the others arrive when the collector goes on."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "600")
    exporter = _Scripted()
    tracer = sdk.SdkTracer(sdk.LimitedProcessor(exporter))
    with capture_logs() as logs:
        for _ in range(650):
            tracer.start("name", None).end()
        exporter.go_on.set()
        await tracer.close()
    assert [(each["log_level"], each["lost"]) for each in logs] == [("warning", 1), ("info", 50)]


async def test_the_end_waits_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that hangs delays the end of a process by a few seconds, and never its event loop."""
    monkeypatch.setattr(sdk, "FLUSH_SECONDS", 0.3)

    exporter = _Scripted()
    tracer = sdk.SdkTracer(sdk.LimitedProcessor(exporter))
    tracer.start("name", None).end()
    ticks, began = 0, time.monotonic()

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    task = asyncio.create_task(tick())
    with capture_logs() as logs:
        await tracer.close()
    task.cancel()
    exporter.go_on.set()
    assert 0.25 < time.monotonic() - began < 1.5
    assert ticks > 10
    assert [each["event"] for each in logs] == ["the last spans are lost: the collector does not answer"]


def test_an_error_is_a_word() -> None:
    """Of an error a span gets the reason, or else the class: a text may quote anything."""
    assert error_type(ClipiaUnavailable("token=1", reason="no_answer")) == "no_answer"
    assert error_type(ValueError("secret")) == "ValueError"
    odd = RefusedByClipia("x", code="no word: secret", status=400)
    assert error_type(odd) == "RefusedByClipia"


def test_the_page_has_every_span() -> None:
    """docs/tracing.md names the spans that the code makes."""
    root = Path(__file__).parents[2]
    page = (root / "docs/tracing.md").read_text()
    code = "".join((root / "receiver" / path).read_text() for path in SPANS_IN)
    made = re.findall(r'(?:tracer\.start|start_call|\.child)\(\s*(?:self\._tracer, )?f?"([^"]+)"', code)
    assert {"submit job", "fan out", "poll Clipia", "send {name}"} <= set(made)
    names = {name.replace("send {name}", "send NAME").replace("{name}", "media") for name in made}
    assert not [name for name in names if f"`{name}`" not in page], names
