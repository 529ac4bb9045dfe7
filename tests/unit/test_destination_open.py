"""Destination URLs: the known schemes, the invalid URLs, and the text of their errors."""

import asyncio
import ssl
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs
from support.certificates import make_certificate
from support.kinds_base import HttpSink, make_event, open_url

from receiver import destinations
from receiver.destination_settings import DestinationSettings
from receiver.destinations import Destination, open_for_work, started
from receiver.destinations.base import encode
from receiver.destinations.file import FileDestination
from receiver.destinations.http import HttpDestination
from receiver.destinations.kafka import KafkaDestination
from receiver.destinations.memory import MemoryDestination
from receiver.destinations.nats import NatsDestination
from receiver.destinations.rabbitmq import RabbitmqDestination
from receiver.destinations.redis import RedisDestination
from receiver.destinations.sqs import SqsDestination
from receiver.errors import PublishFailed, PublishRejected, SettingsError

CANARY = "s3cr3t-canary"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("file:events.jsonl", FileDestination),
        ("file:///srv/events.jsonl", FileDestination),
        ("http://localhost/hook", HttpDestination),
        ("https://example.com/hook?a=b", HttpDestination),
        ("HTTPS://example.com", HttpDestination),
        ("memory:", MemoryDestination),
        ("amqp://host/?queue=q", RabbitmqDestination),
        ("amqps://host/?queue=q", RabbitmqDestination),
        ("redis://host?stream=s", RedisDestination),
        ("rediss://host/0?stream=s", RedisDestination),
        ("nats://host?subject=s", NatsDestination),
        ("kafka://host/topic", KafkaDestination),
        ("sqs://sqs.eu-west-1.amazonaws.com/123456789012/queue", SqsDestination),
    ],
)
async def test_scheme_chooses_the_kind(url: str, kind: type) -> None:
    """The URL's scheme, in any case, names the kind of destination."""
    destination = open_url(url)
    assert type(destination) is kind
    await destination.close()


@pytest.mark.parametrize(
    ("url", "extra"),
    [
        ("amqp://host/?queue=q", "rabbitmq"),
        ("redis://host?stream=s", "redis"),
        ("nats://host?subject=s", "nats"),
        ("kafka://host/topic", "kafka"),
        ("sqs://sqs.eu-west-1.amazonaws.com/123456789012/queue", "sqs"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, url: str, extra: str) -> None:
    """If the client library of a kind is not installed, one clear error names the package to install."""
    client = {
        "rabbitmq": "aiormq",
        "nats": "nats",
        "kafka": "aiokafka",
        "sqs": "aiobotocore",
        "redis": "redis",
    }
    monkeypatch.delitem(sys.modules, f"receiver.destinations.{extra}", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == client[extra]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(client[extra]), *sys.meta_path])
    with pytest.raises(SettingsError, match=rf"clipia-receiver\[{extra}\]"):
        open_url(url)


class Missing:
    """An import system without one package."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: object) -> None:
        """Find every package but that one."""
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    "url", ["", "events.jsonl", f"gopher://u:{CANARY}@host", CANARY, f"://{CANARY}", "file"]
)
def test_unknown_scheme_is_rejected(url: str) -> None:
    """A URL without a known scheme is rejected with the list of known ones, and is not quoted."""
    with pytest.raises(SettingsError) as caught:
        open_url(url)
    message = str(caught.value)
    assert all(word in message for word in ("'test'", "file:", "http:", "https:", "memory:"))
    assert CANARY not in message


@pytest.mark.parametrize(
    "url",
    [
        "file:",
        "file:/",
        "file:///",
        "file://host/events.jsonl",
        f"file:events.jsonl?token={CANARY}",
        f"file:events.jsonl#{CANARY}",
        "file:a%00b",
        "file://[",
        "https:",
        "https://",
        "https:///hook",
        "https:example.com",
        f"https://user:{CANARY}@:443/hook",
        f"https://host:{CANARY}/",
        f"https://host:99999999/{CANARY}",
        f"https://host:0/{CANARY}",
        f"https://ho st/{CANARY}",
    ],
)
def test_unusable_url_is_rejected(url: str) -> None:
    """G8: an invalid URL is rejected with a valid example, and is not quoted."""
    with pytest.raises(SettingsError) as caught:
        open_url(url)
    assert "'test'" in str(caught.value)
    assert "write " in str(caught.value)
    assert CANARY not in str(caught.value)


async def test_memory_destination_warns() -> None:
    """A memory destination warns at start that it keeps no events."""
    with capture_logs() as logs:
        await open_url("memory:").start()
    assert [(entry["log_level"], entry["destination"]) for entry in logs] == [("warning", "test")]


class Slow(MemoryDestination):
    """A destination that fails to start, or never ends its start."""

    def __init__(self, failure: Exception | None) -> None:
        super().__init__(DestinationSettings(name="slow", url=SecretStr("memory:")))
        self._failure = failure
        self.is_closed = False

    async def start(self) -> None:
        """Fail or wait."""
        if self._failure is not None:
            raise self._failure
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Record that it was closed."""
        self.is_closed = True


async def test_a_destination_that_does_not_start_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: if one fails to start for any reason, or takes too long, it is down, and the others work."""
    monkeypatch.setattr(destinations, "START_SECONDS", 0.05)
    made: dict[str, Destination] = {
        "hangs": Slow(None),
        "wrong": Slow(SettingsError("our own words")),
        "odd": Slow(ValueError(CANARY)),
        "fine": open_url("memory:"),
    }
    with capture_logs() as logs:
        async with asyncio.timeout(5), started(made) as down:
            assert down == {"hangs", "wrong", "odd"}
    errors = {entry["destination"]: entry["error"] for entry in logs if entry["log_level"] == "error"}
    assert errors["wrong"] == "our own words"
    assert "ValueError" in errors["odd"]
    assert CANARY not in str(logs)
    assert [each.is_closed for each in made.values() if isinstance(each, Slow)] == [True] * 3


async def test_a_certificate_that_comes_later_is_used(tmp_path: Path) -> None:
    """E4: if a destination's files cannot be read the process starts, and it works once they can be."""
    certificate = make_certificate(tmp_path / "server.pem")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    sink = await HttpSink().start(ssl=tls)
    authority = tmp_path / "later.pem"
    values = {"name": "test", "url": sink.url, "tls": {"ca": str(authority)}}
    destination = open_for_work(DestinationSettings.model_validate(values))
    assert destination.concurrency == HttpDestination.concurrency, (
        "a lane reads it once, before the file comes"
    )
    async with started({"test": destination}) as down:
        assert down == {"test"}
        with pytest.raises(PublishFailed, match=r"tls\.ca cannot be read: No such file"):
            await destination.publish(make_event())
        authority.write_bytes(certificate.read_bytes())
        await destination.publish(make_event())
    assert len(sink.requests) == 1
    await sink.stop()
    with pytest.raises(SettingsError):
        open_for_work(DestinationSettings.model_validate({"name": "test", "url": "gopher://host"}))


def test_encoding_is_one_line() -> None:
    """A message is one line with any text in it: the file's lines and their repair rely on it."""
    encoded = encode(make_event({"text": "a\nb\r\u2028\u0085\x0b"}))
    assert encoded.splitlines() == [encoded]
    assert encoded.startswith(b"{")


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", 1 + 2j, "deep"])
def test_unencodable_event_is_rejected_for_good(value: object) -> None:
    """E7: an event that JSON cannot express is rejected."""
    if value == "deep":
        value = {}
        for _ in range(100_000):
            value = [value]
    with pytest.raises(PublishRejected) as caught:
        encode(make_event({"value": value}))
    assert caught.value.reason == "encoding"
