"""Masking: a quoted text contains no recognizable part of a secret."""

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.masking import MASK, mask, register_secret, register_url

SECRET = "cAnArY8f3b61+d2e9/xyz"
KEY = f"clipia_live_{SECRET}"


@pytest.mark.parametrize(
    "said",
    [
        SECRET,
        f"Invalid key {KEY}.",
        f"Illegal header value b'Bearer {KEY}\\n'",
        f"{SECRET[:12]}…",
        f"…{SECRET[9:]}",
        quote(SECRET, safe=""),
        json.dumps({"authorization": f"Bearer {SECRET}"}),
        base64.b64encode(SECRET.encode()).decode(),
        base64.b64encode(f"user:{SECRET}".encode()).decode(),
        base64.b64encode(f"ab:{SECRET}:cd".encode()).decode(),
        SECRET * 3,
    ],
)
def test_a_secret_that_is_held_is_masked_in_every_form(said: str) -> None:
    """A secret is masked if a peer repeats it whole, cut in two, escaped, percent-encoded or in base64."""
    register_secret(KEY)
    masked = mask(said)
    assert MASK in masked
    for form in (SECRET, quote(SECRET, safe=""), base64.b64encode(SECRET.encode()).decode()):
        assert not any(form[at : at + 8] in masked for at in range(len(form) - 7))


@pytest.mark.parametrize(
    "said", ["x", "", "no such model", "Invalid key clipia_live_", "whsec_ is how it starts"]
)
def test_other_words_stay(said: str) -> None:
    """Text outside of a secret is kept, and so is the public start of all keys."""
    register_secret(KEY)
    assert mask(said) == said


@given(before=st.text(), secret=st.text("abcdefgh0123", min_size=8, max_size=64), after=st.text())
def test_what_stands_around_a_secret_stays(before: str, secret: str, after: str) -> None:
    """The secret is masked, and the rest of the text is kept."""
    register_secret(secret)
    masked = mask(f"{before} {secret} {after}")
    assert secret not in masked
    assert mask(masked) == masked


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("postgresql://user:pass word@host/name", "pass word"),
        ("amqp://user:p%40ssw%2Frd@host", "p@ssw/rd"),
        ("amqp://user:p%40ssw%2Frd@host", "p%40ssw%2Frd"),
        ("redis://:hunter-22222@host", "hunter-22222"),
        ("nats://a-token-here@host", "a-token-here"),
        ("postgresql://host/name?user=u&password=hunter-22222", "hunter-22222"),
        ("https://host/in?api_key=hunter-22222#x", "hunter-22222"),
        ("amqp://user:broken\nhunter-22222@host", "broken\nhunter-22222"),
        ("amqp://user:broken\nhunter-22222@host", "hunter-22222"),
        ("amqp://user:a/b@c#d?e@host", "a/b@c#d?e"),
        ("redis://user:four@host", "four"),
        ("postgresql://user:hunter,22222@host/name", "hunter,22222"),
        ("nats://user:other-one-1@host,nats://user:hunter-22222@host", "hunter-22222"),
        ("https://host/in?sv=2026-01-01&sig=hunter-22222", "hunter-22222"),
    ],
)
def test_the_password_of_a_url_is_masked(url: str, secret: str) -> None:
    """The password of a URL is a secret, even if the URL is invalid; its user and host are not."""
    register_url(url)
    assert mask(f"Login refused: {secret}") == f"Login refused: {MASK}"
    assert mask("user host name") == "user host name"


def test_names_in_a_url_are_no_secrets() -> None:
    """The names of queues and streams, which messages contain, are not masked, although URLs contain them."""
    register_url("amqp://user:hunter-22222@host/?exchange=the-exchange&routing_key=the-routing-key")
    register_url("https://hooks.example.com/in?to=somebody@example.com")
    assert mask("https://hooks.example.com/in is away") == "https://hooks.example.com/in is away"
    assert mask("no queue 'the-routing-key' at the-exchange") == "no queue 'the-routing-key' at the-exchange"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://receiver@/receiver",
        "postgresql+asyncpg://receiver@host/receiver",
        " 'postgres://receiver@host/receiver'",
        "postgresql://receiver:receiver@host/receiver",
        "postgresql://receiver:receiver-22222@host/receiver",
        "amqp://shop-orders:shop-orders@host",
        "amqp://guest@host?passive=true",
        "postgresql://host/name?passfile=/run/receiver/passfile",
        "https://host/in?token_url=https://host/receiver",
        "nats://user:hunter-22222@host,nats://user:hunter-33333@host",
    ],
)
def test_words_that_are_no_secret_stay(url: str) -> None:
    """A user, a path, a harmless option and a default password are not masked."""
    register_url(url)
    words = (
        "the receiver is away; guest of shop-orders is true: nats://host, /run/receiver/passfile https://host"
    )
    assert mask(words) == words


def test_a_login_in_a_header_is_masked() -> None:
    """HTTP's basic authentication, with user and password in base64, is masked."""
    register_url("https://user:hunter-22222@host")
    header = base64.b64encode(b"user:hunter-22222").decode()
    assert mask(f"you sent {header}") == f"you sent {MASK}"


@pytest.mark.parametrize(
    ("said", "masked"),
    [
        ("key clipia_test_0123456789abcdef refused", f"key clipia_test_{MASK} refused"),
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", f"whsec_{MASK}"),
        ("Authorization: Bearer abcdef0123", f"Authorization: Bearer {MASK}"),
        ("amqp://guest:guest@127.0.0.1/", f"amqp://{MASK}@127.0.0.1/"),
        ("basic authentication is needed", "basic authentication is needed"),
        ("see https://docs.example.com/a@b", "see https://docs.example.com/a@b"),
    ],
)
def test_an_unregistered_secret_is_masked_by_its_form(said: str, masked: str) -> None:
    """The key before the last rotation is masked: rows may contain it."""
    assert mask(said) == masked


def test_a_very_short_secret_is_masked_nowhere() -> None:
    """A password of three characters is not masked: ordinary words contain it."""
    register_secret("abc")
    assert mask("abc abcdef") == "abc abcdef"
