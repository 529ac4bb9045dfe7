"""The `[[destinations]]` tables: valid and invalid values, and the secrets in them."""

import base64
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import make_certificate
from support.kinds_base import open_url

from receiver import masking
from receiver.destinations.http import HttpDestination
from receiver.errors import SettingsError
from receiver.masking import mask
from receiver.process import make_target
from receiver.settings import Settings

CANARY = "cAnArY-7d1e9b4420"
TABLE = """
[[destinations]]
name = "orders"
url = "https://orders.internal/clipia"
secret = "${NEW},${OLD}"
headers = { Authorization = "Bearer ${TOKEN}", X-Api-Key = "${KEY}" }
timeout = 2.5
concurrency = 4
rate = 20
tls = { ca = "/etc/ca.pem", certificate = "/etc/client.pem", key = "/etc/client.key" }
"""


def load(table: str) -> Settings:
    """Read a `receiver.toml`."""
    Path("receiver.toml").write_text(table)
    return Settings.load()


def forms(secret: str) -> Iterator[str]:
    """Return the forms in which a peer might repeat a secret."""
    yield secret
    yield json.dumps(f"Bearer {secret}")
    yield base64.b64encode(f"x:{secret}".encode()).decode()


def test_a_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: all of a destination's settings are read, and no secret among them is shown."""
    secrets = {name: f"{CANARY}-{name}-5f2c" for name in ("NEW", "OLD", "TOKEN", "KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, f" {value}\n")
    settings = load(TABLE)
    (orders,) = settings.all_destinations
    assert orders.secrets == (secrets["NEW"], secrets["OLD"])
    assert {name: value.get_secret_value() for name, value in orders.headers.items()} == {
        "Authorization": f"Bearer {secrets['TOKEN']}",
        "X-Api-Key": secrets["KEY"],
    }
    assert (orders.timeout, orders.concurrency, orders.rate) == (2.5, 4, 20)
    assert orders.tls is not None
    assert orders.tls.model_dump() == {
        "ca": "/etc/ca.pem",
        "certificate": "/etc/client.pem",
        "key": "/etc/client.key",
    }
    assert orders.summary == (
        "4 at once, 20 per second, 2.5 s per attempt, headers Authorization, X-Api-Key, "
        "signed with 2 secrets, its own authorities, a client certificate"
    )
    for secret in secrets.values():
        assert secret not in repr(settings) + str(orders)
        for form in forms(secret):
            assert form not in mask(f"the peer says {form} again")


def test_a_process_that_got_its_settings_masks_headers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: a worker process that unpickles its settings masks the headers' values after `register_secrets`."""
    value = "unPiCkLeD-81f3a0c7d2"
    settings = load(f"[[destinations]]\nname = 'a'\nurl = 'https://x'\nheaders = {{ X-Key = '{value}' }}")
    pickled = pickle.dumps(settings)
    monkeypatch.setattr(masking, "_pieces", set())
    pickle.loads(pickled).register_secrets()
    assert value not in mask(f"X-Key: {value}")


def test_headers_are_masked_beside_other_mistakes() -> None:
    """G8: a header's value is masked even if another setting of its table is a mistake."""
    value = "eLsEwHeRe-5d20b7c1a9"
    table = f"[[destinations]]\nname = 'a'\nurl = 'https://x'\ntimeout = 0\nheaders = {{ X-Key = '{value}' }}"
    with pytest.raises(SettingsError):
        load(table)
    assert value not in mask(f"X-Key: {value}")


def test_the_lane_gets_its_limits() -> None:
    """E5: a worker's lane keeps the limits that the table sets."""
    (settings,) = load(
        "[[destinations]]\nname = 'a'\nurl = 'memory:'\nconcurrency = 3\nrate = 7"
    ).destinations
    target = make_target(settings, open_url("memory:"))
    assert (target.concurrency, target.rate) == (3, 7)


@pytest.mark.parametrize(
    "url", ["https://x/@team/hook", "https://x?to=a@b", "https://x/in#a@b", "https://x?/@"]
)
def test_an_at_sign_outside_of_the_login_is_no_user(url: str) -> None:
    """G8: the header Authorization fits a URL that has an @, but no user."""
    (settings,) = load(
        f"[[destinations]]\nname='a'\nurl='{url}'\nheaders = {{ Authorization = 'Bearer 1' }}"
    ).destinations
    assert list(settings.headers) == ["Authorization"]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("X-Team = 'video'", "a video"),
        ("X-Year = '2026'", "2026-11-30"),
        ("X-Number = '1234567'", "1234567 bytes"),
        ("X-Environment = 'production'", "not found in production"),
        ("X-Region = 'eu-west-1'", "the queue in eu-west-1"),
        ("X-Author = 'Jane Doe'", "by Jane Doe"),
        ("X-Count = '**'", "**"),
        ("X-Compass = 'north-west'", "north-west"),
        ("Host = 'api-7f3a.internal.example.com'", "api-7f3a.internal.example.com is away"),
        ("Accept = 'application/vnd.x3y4z5+json; q=0.9'", "wants application/vnd.x3y4z5+json"),
        ("User-Agent = 'MyShop/1.0 (x86_64)'", "MyShop/1.0 (x86_64)"),
        ("Host = '${WORDS}'", "orders.internal.example.com is away"),
        ("X-Stage = '${STAGE}'", "in staging"),
    ],
)
def test_words_in_headers_stay_words(monkeypatch: pytest.MonkeyPatch, header: str, words: str) -> None:
    """G8: if a header's value is not a secret, no message that holds the same words is masked."""
    monkeypatch.setattr(masking, "_pieces", set())
    monkeypatch.setattr(masking, "_short", set())
    monkeypatch.setenv("WORDS", "orders.internal.example.com")
    monkeypatch.setenv("STAGE", "staging")
    load(f"[[destinations]]\nname = 'a'\nurl = 'https://x'\nheaders = {{ {header} }}")
    assert mask(words) == words


@pytest.mark.parametrize(
    ("header", "secret"),
    [
        ("X-Login = 'zq7Kv'", "zq7Kv"),
        ("X-Shop = 'qwertyuiopasdfgh'", "qwertyuiopasdfgh"),
        ("X-Shop = '0123456789'", "0123456789"),
        ("X-Shop = 'a!b#c%d&e'", "a!b#c%d&e"),
        ("X-Api-Key = 'some-plain-words'", "some-plain-words"),
        ("X-Auth = 'some-plain-words'", "some-plain-words"),
        ("Cookie = 'id=plain-words'", "id=plain-words"),
        ("X-Shop = '${WORDS}'", "some-plain-words"),
        ("User-Agent = 'shop/1 (${RANDOM})'", "8f3b61d2e9b7"),
    ],
)
def test_secrets_in_headers_are_masked(monkeypatch: pytest.MonkeyPatch, header: str, secret: str) -> None:
    """G8: a header is masked if a variable sets it, its name suggests a secret or it looks random."""
    monkeypatch.setattr(masking, "_pieces", set())
    monkeypatch.setattr(masking, "_short", set())
    monkeypatch.setenv("WORDS", "some-plain-words")
    monkeypatch.setenv("RANDOM", "8f3b61d2e9b7")
    settings = load(f"[[destinations]]\nname = 'a'\nurl = 'https://x'\nheaders = {{ {header} }}")
    assert secret not in mask(f"you sent {secret}")
    pickled = pickle.dumps(settings)
    monkeypatch.setattr(masking, "_pieces", set())
    monkeypatch.setattr(masking, "_short", set())
    pickle.loads(pickled).register_secrets()
    assert secret not in mask(f"you sent {secret}")


def test_a_password_in_a_basic_header_is_masked() -> None:
    """G8: a password that a header holds in base64 is masked in plain text, too."""
    login = base64.b64encode(b"user:pAsSwOrD-93c1e7").decode()
    load(f"[[destinations]]\nname = 'a'\nurl = 'https://x'\nheaders = {{ Authorization = 'Basic {login}' }}")
    assert "93c1e7" not in mask("the password pAsSwOrD-93c1e7 is wrong")


@pytest.mark.parametrize(
    ("url", "line", "said"),
    [
        ("https://x", 'headers = { Content-Type = "text/plain" }', "content-type is set by the receiver"),
        ("https://x", 'headers = { webhook-signature = "v1,x" }', "webhook-signature is set by the receiver"),
        ("https://x", 'headers = { ce-id = "1" }', "ce-id is set by the receiver"),
        ("https://x", 'headers = { Traceparent = "1" }', "traceparent is set by the receiver"),
        ("https://x", 'headers = { "X Key" = "1" }', "a header's name has letters"),
        ("https://x", 'headers = { "X-Key:" = "1" }', "a header's name has letters"),
        ("https://x", 'headers = { X-Key = "" }', "X-Key is empty"),
        ("https://x", 'headers = { X-Key = "${EMPTY}" }', "X-Key is empty"),
        ("https://x", 'headers = { X-Key = "Zürich" }', "not ASCII"),
        ("https://x", 'headers = { X-Key = "a\\nb" }', "headers.X-Key: contains a line feed"),
        ("https://x", 'headers = { X-Key = "${SPLIT}" }', "headers.X-Key: contains a carriage return"),
        ("https://x", 'headers = { X-Key = "1", x-key = "2" }', "twice"),
        ("https://u:p@x", 'headers = { authorization = "Bearer 1" }', "the URL contains a user"),
        ("HTTPS://u@x/@a", 'headers = { authorization = "Bearer 1" }', "the URL contains a user"),
        ("redis://x?stream=s", 'headers = { X-Key = "1" }', "for http: and https: only"),
        ("file:x", "tls = { ca = 'ca.pem' }", "tls is for URLs that start with https:, amqps:"),
        ("http://x", "tls = { ca = 'ca.pem' }", "tls is for URLs"),
        ("redis://x?stream=s", "tls = { ca = 'ca.pem' }", "tls is for URLs"),
        ("https://x", "tls = { key = 'client.key' }", "key needs certificate"),
        ("https://x", "tls = { }", "write ca, certificate or both"),
        ("https://x", "tls = { insecure = true }", "destinations.0.tls.insecure: is not a setting"),
        ("https://x", "timeout = 0", "destinations.0.timeout"),
        ("https://x", "timeout = 301", "destinations.0.timeout"),
        ("https://x", "timeout = nan", "destinations.0.timeout"),
        ("https://x", "concurrency = 0", "destinations.0.concurrency"),
        ("https://x", "concurrency = 1.5", "destinations.0.concurrency"),
        ("https://x", "rate = 0", "destinations.0.rate"),
        ("https://x", "rate = inf", "destinations.0.rate"),
    ],
)
def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, url: str, line: str, said: str) -> None:
    """G8: an impossible setting is an error that names it."""
    monkeypatch.setenv("EMPTY", " ")
    monkeypatch.setenv("SPLIT", f"{CANARY}\r\nX-Other: 1")
    with pytest.raises(SettingsError, match=said) as caught:
        load(f'[[destinations]]\nname = "a"\nurl = "{url}"\n{line}\n')
    assert CANARY not in str(caught.value)


def encrypted_key(path: Path) -> Path:
    """Write a key with a passphrase."""
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    return path


URLS = {
    "https": "https://127.0.0.1/events",
    "amqps": "amqps://127.0.0.1/?queue=events",
    "rediss": "rediss://127.0.0.1/0?stream=events",
    "nats": "nats://127.0.0.1?subject=events",
    "tls": "tls://127.0.0.1?subject=events",
    "kafka": "kafka://127.0.0.1/events?security=ssl",
    "sqs": "sqs://sqs.eu-west-1.amazonaws.com/123456789012/events",
}


@pytest.mark.parametrize("kind", URLS)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, kind: str) -> None:
    """G8: each kind of destination rejects unusable files, and names their setting and not their path."""
    good = make_certificate(tmp_path / "good.pem")
    other = make_certificate(tmp_path / "other.pem")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"ca": "absent.pem"}, "tls.ca cannot be read: No such file"),
        ({"ca": __file__}, "tls.ca does not hold certificates in PEM"),
        ({"ca": "a\0b"}, "tls.ca cannot be read"),
        ({"certificate": "absent.pem"}, "tls.certificate cannot be read: No such file"),
        (
            {"certificate": str(good), "key": str(other)},
            "tls.key does not hold a certificate and its own key",
        ),
        (
            {"certificate": str(good), "key": str(encrypted_key(tmp_path / "key.pem"))},
            "tls.key is encrypted: write the key without a passphrase",
        ),
    ]
    for tls, said in cases:
        with pytest.raises(SettingsError, match=said) as caught:
            open_url(URLS[kind], tls=tls)
        assert "pem" not in str(caught.value)
    open_url(URLS[kind], tls={"ca": str(good), "certificate": str(good)})


def test_a_client_key_is_masked(tmp_path: Path) -> None:
    """G8: if a peer repeats a line of a client certificate's key, it is masked."""
    path = make_certificate(tmp_path / "client.pem")
    open_url(URLS["https"], tls={"certificate": str(path)})
    for line in path.read_text().partition("-----END PRIVATE")[0].splitlines()[1:]:
        assert line not in mask(f"read {line}")


def test_tls_of_kafka_needs_security() -> None:
    """G8: `tls` beside a Kafka URL without TLS is a mistake, not silently plain text."""
    with pytest.raises(SettingsError, match="tls needs security=ssl or sasl_ssl"):
        open_url("kafka://127.0.0.1/events", tls={"ca": "ca.pem"})


async def test_a_client_certificate_changes_no_authorities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E14: beside a client certificate alone, HTTP trusts the bundled authorities as without `tls`."""
    bundle, certificate = make_certificate(tmp_path / "a.pem"), make_certificate(tmp_path / "b.pem")
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(certifi, "where", lambda: str(bundle))
    destination = open_url(URLS["https"], tls={"certificate": str(certificate)})
    assert isinstance(destination, HttpDestination)
    context = destination._transport._tls
    assert context.cert_store_stats()["x509"] == 1
    await destination.close()
