"""The allow-list of media hosts."""

from types import SimpleNamespace

import httpx
import pytest

from receiver.errors import MediaBlocked, SettingsError
from receiver.media import MediaHosts

HOSTS = MediaHosts.parse(["media.clipia.ai", "http://127.0.0.1:9000", "https://cdn.example.com:8443"])

BLOCKED = [
    ("https://media.clipia.ai@evil.example/x", "userinfo"),
    ("https://media.clipia.ai:443@evil.example/x", "userinfo"),
    ("https://user:secret@media.clipia.ai/x", "userinfo"),
    ("https://:@media.clipia.ai/x", "userinfo"),
    ("https://@media.clipia.ai/x", "url"),
    ("https://evil.example\\@media.clipia.ai/x", "url"),
    ("https://media.clipia.ai\\.evil.example/x", "url"),
    ("https://media\u3002clipia\u3002ai/x", "url"),
    ("https://m\u00e9dia.clipia.ai/x", "host"),
    ("https://media.clip\tia.ai/x", "url"),
    ("https://media.clipia.ai\x00.evil.example/", "url"),
    ("https://media.clipia.ai/x\x7f", "url"),
    ("https://media.clipia.ai#@evil.example/", "url"),
    ("https://media.clipia.ai /x", "host"),
    ("https://media.clipia.ai\u00a0/x", "url"),
    ("https://media.clipia.ai%/x", "host"),
    ("https://media.clipia.ai/a\nb", "url"),
    ("https://media.clipia.ai/\ud800", "url"),
    ("https://media.clipia.ai/" + "x" * 70_000, "url"),
    ("https://media%2eclipia.ai/x", "host"),
    ("https://media.clipia.ai%00.evil.example/", "host"),
    ("https://media.clipia.ai;evil.example/", "host"),
    ("https://media.clipia.ai./x", "host"),
    ("https://media.clipia.ai.evil.example/x", "host"),
    ("https://evil-media.clipia.ai/x", "host"),
    ("https://sub.media.clipia.ai/x", "host"),
    ("https://clipia.ai/x", "host"),
    ("https://xn--mdia-bpa.clipia.ai/x", "host"),
    ("//media.clipia.ai/x", "scheme"),
    ("https:media.clipia.ai/x", "host"),
    ("https:///media.clipia.ai/x", "host"),
    ("media.clipia.ai/x", "host"),
    ("", "url"),
    ("https://media.clipia.ai:80:443/", "url"),
    ("https://[media.clipia.ai]/", "url"),
    ("https://media.clipia.ai:444/x", "port"),
    ("https://media.clipia.ai:0/x", "port"),
    ("https://media.clipia.ai:80/x", "port"),
    ("https://media.clipia.ai:0443/x", "url"),
    ("https://media.clipia.ai:/x", "url"),
    ("http://media.clipia.ai/x", "scheme"),
    ("http://media.clipia.ai:443/x", "scheme"),
    ("ftp://media.clipia.ai/x", "scheme"),
    ("file://media.clipia.ai/x", "scheme"),
    ("data:image/png;base64,AAAA", "host"),
    ("https://127.0.0.1/x", "scheme"),
    ("https://127.0.0.1:9000/x", "scheme"),
    ("http://127.0.0.1:9001/x", "port"),
    ("http://127.0.0.1/x", "port"),
    ("http://127.1:9000/x", "host"),
    ("http://2130706433:9000/x", "host"),
    ("http://localhost:9000/x", "host"),
    ("http://[::1]:9000/x", "host"),
    ("https://cdn.example.com/x", "port"),
]


@pytest.mark.parametrize(("url", "reason"), BLOCKED)
def test_blocks_every_other_spelling(url: str, reason: str) -> None:
    """D1: if a URL is not exactly of an allowed origin, it is blocked, with the difference as reason."""
    with pytest.raises(MediaBlocked) as caught:
        HOSTS.vet(url)
    assert caught.value.reason == reason
    assert HOSTS.skip_reason(url) is not None


@pytest.mark.parametrize(
    "url",
    [
        "https://media.clipia.ai/works/a.png",
        "https://media.clipia.ai:443/works/a.png?x=1&y=@z",
        "HTTPS://MEDIA.CLIPIA.AI/works/A.png",
        "https://media.clipia.ai",
        "https://media.clipia.ai?x",
        "http://127.0.0.1:9000/sandbox/sample-image.png",
        "https://cdn.example.com:8443/x",
    ],
)
def test_lets_allowed_origins_pass(url: str) -> None:
    """D1: URLs of allowed origins pass, parsed by the library that connects."""
    vetted = HOSTS.vet(url)
    assert HOSTS.skip_reason(url) is None
    assert (vetted.scheme, vetted.host) in {
        ("https", "media.clipia.ai"),
        ("http", "127.0.0.1"),
        ("https", "cdn.example.com"),
    }


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://media.clipia.ai/x#fragment", b"/x"),
        ("https://media.clipia.ai/x#", b"/x"),
        ("https://media.clipia.ai?x#y", b"/?x"),
        (" https://media.clipia.ai/x\r\n", b"/x"),
        ("https://media.clipia.ai/a b?c d", b"/a%20b?c%20d"),
        ("https://media.clipia.ai/\u00e9\u3000\U0001f600", b"/%C3%A9%E3%80%80%F0%9F%98%80"),
        ("https://media.clipia.ai/5%?100%&%41", b"/5%25?100%25&%41"),
    ],
)
def test_odd_letters_are_encoded(url: str, target: bytes) -> None:
    """D1: blanks, bare percent signs and non-ASCII letters are encoded; a fragment is not requested."""
    vetted = HOSTS.vet(url)
    assert (vetted.netloc, vetted.raw_path, vetted.fragment) == (b"media.clipia.ai", target, "")
    assert HOSTS.skip_reason(url) is None


def test_thousands_of_urls_are_judged_without_parsing_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """D1: a usual URL of an allowed origin is never parsed, and a foreign origin once."""
    hosts = MediaHosts.parse(["media.clipia.ai", "http://[::1]:9000"])
    parsed: list[str] = []

    def count(url: str) -> httpx.URL:
        parsed.append(url)
        return httpx.URL(url)

    monkeypatch.setattr("receiver.media.hosts.httpx", SimpleNamespace(URL=count, InvalidURL=httpx.InvalidURL))
    for number in range(1000):
        assert hosts.skip_reason(f"https://media.clipia.ai/works/{number}.png?x=%20") is None
        assert hosts.skip_reason(f"https://media.clipia.ai:443/works/{number}") is None
        assert hosts.skip_reason(f"http://[::1]:9000/works/{number}") is None
        skip = hosts.skip_reason(f"https://foreign.example.com/{number}")
        assert skip is not None
        assert skip.reason == "host"
    assert parsed == ["https://foreign.example.com/"]


def test_the_message_shows_no_path_or_query() -> None:
    """D1: the message may be logged, because it names only the origin."""
    with pytest.raises(MediaBlocked) as caught:
        HOSTS.vet("https://evil.example/secret-path?token=secret-token")
    assert "secret" not in str(caught.value)


def test_plain_http_and_loopback_are_development_origins() -> None:
    """D1: origins that skip the check of addresses are listed, for a warning at start."""
    hosts = MediaHosts.parse(
        [
            "media.clipia.ai",
            "http://cdn:8080",
            "https://localhost:9443",
            "http://[::1]:9000",
            "https://cdn.example.com:8443",
        ]
    )
    assert hosts.development_origins == ("http://[::1]:9000", "http://cdn:8080", "https://localhost:9443")
    assert hosts.vet("http://[::1]:9000/x").port == 9000


def test_only_the_exact_development_origin_skips_the_guard() -> None:
    """D2: another port of the same host is checked like any other address."""
    assert HOSTS.is_development("127.0.0.1", 9000)
    assert not HOSTS.is_development("127.0.0.1", 443)
    assert not HOSTS.is_development("media.clipia.ai", 443)


def test_reads_unambiguous_entries_leniently() -> None:
    """D1: case, surrounding space and a trailing slash of an entry do not matter."""
    hosts = MediaHosts.parse([" Media.Clipia.AI ", "", "http://127.0.0.1:9000/"])
    assert hosts.vet("https://media.clipia.ai/x").host == "media.clipia.ai"
    assert hosts.development_origins == ("http://127.0.0.1:9000",)


@pytest.mark.parametrize(
    "entry",
    [
        "*.clipia.ai",
        "media.clipia.ai/works",
        "media.clipia.ai:443",
        "media.clipia.ai.",
        "user@media.clipia.ai",
        "http://user@127.0.0.1:9000",
        "http://127.0.0.1:9000/path",
        "http://127.0.0.1:9000?x",
        "http://127.0.0.1:0",
        "http://127.0.0.1:65536",
        "http://",
        "ftp://media.clipia.ai",
        "media clipia.ai",
        "m\u00e9dia.clipia.ai",
        "-media.clipia.ai",
        "http://[::1",
        "a" * 64,
    ],
)
def test_an_invalid_entry_stops_the_start(entry: str) -> None:
    """D1: an ambiguous entry is invalid; the message gives its number and examples."""
    with pytest.raises(SettingsError, match="RECEIVER_MEDIA_HOSTS"):
        MediaHosts.parse(["media.clipia.ai", entry])


@pytest.mark.parametrize("entries", [[], [""], [" ", ""]])
def test_an_empty_setting_stops_the_start(entries: list[str]) -> None:
    """D1: an empty allow-list would block every file, so it is invalid."""
    with pytest.raises(SettingsError, match="RECEIVER_MEDIA_HOSTS is empty"):
        MediaHosts.parse(entries)
