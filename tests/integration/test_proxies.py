"""Configured proxies for Clipia, media and HTTP destinations, and a private authority for media."""

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr
from support.certificates import make_certificate
from support.kinds_base import make_event
from support.media import PNG, Site, local_storage, response, site, stored_files
from support.proxies import Proxy, proxy

from receiver import __version__
from receiver.clipia import client as client_module
from receiver.clipia.client import Call, ClipiaClient, open_client
from receiver.destination_settings import DestinationSettings, TlsSettings
from receiver.destinations import open_destination
from receiver.errors import ClipiaUnavailable, MediaBlocked, MediaUnavailable, PublishFailed, SettingsError
from receiver.media import Downloader, MediaHosts, open_tls
from receiver.process import Parts
from receiver.settings import Settings

HOST = "media.clipia.ai"
API = "api.clipia.ai"
REFUSALS = [
    b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n",
    b"pr0xy junk\r\n\r\n",
    b"",
]


@asynccontextmanager
async def tls_site(folder: Path, host: str, answer: bytes) -> AsyncIterator[tuple[Site, str]]:
    """Run a TLS server with a certificate for `host`; yield it and the file to trust it with."""
    certificate = make_certificate(folder / "server.pem", host=host)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with site(answer, tls=tls) as server:
        yield server, str(certificate)


@asynccontextmanager
async def downloader(folder: Path, proxied: Proxy, ca: str | None) -> AsyncIterator[Downloader]:
    """Open a downloader behind a proxy."""
    opened = Downloader(
        hosts=MediaHosts.parse([HOST]), storage=local_storage(folder), ca=ca, proxy=proxied.url
    )
    await opened.start()
    yield opened
    await opened.close()


async def test_media_comes_through_the_proxy(tmp_path: Path) -> None:
    """D5: the proxy gets the name and its credentials, and carries only TLS with the host."""
    async with (
        tls_site(tmp_path, HOST, response(PNG)) as (server, ca),
        proxy(server.port) as between,
        downloader(tmp_path, between, ca) as opened,
    ):
        await opened.save(url=f"https://{HOST}/works/a.png?x=y", kind="image", stem="ab/00-image")
        assert between.tunnel_hosts == [f"{HOST}:443"]
        assert b"\r\nProxy-Authorization: Basic " in between.heads[0]
        assert server.requests[0].startswith(b"GET /works/a.png?x=y HTTP/1.1\r\n")
        assert b"proxy-authorization" not in server.requests[0].lower()
    assert stored_files(tmp_path / "media") == {"ab/00-image.png": PNG}


async def test_behind_the_proxy_names_and_certificates_are_still_checked(tmp_path: Path) -> None:
    """D3: the proxy gets hosts of the list only, and a certificate of another name is rejected."""
    async with (
        tls_site(tmp_path, "evil.example", response(PNG)) as (server, ca),
        proxy(server.port) as between,
        downloader(tmp_path, between, ca) as opened,
    ):
        with pytest.raises(MediaBlocked):
            await opened.save(url="https://evil.example/a.png", kind="image", stem="ab/00-image")
        assert between.heads == []
        with pytest.raises(MediaUnavailable) as caught:
            await opened.save(url=f"https://{HOST}/a.png", kind="image", stem="ab/00-image")
        assert caught.value.reason == "connect"
        assert server.requests == []
    assert stored_files(tmp_path / "media") == {}


@pytest.mark.parametrize("answer", REFUSALS, ids=["403", "407", "502", "301", "junk", "cut"])
async def test_an_error_of_the_proxy_is_no_answer_of_the_host(answer: bytes, tmp_path: Path) -> None:
    """D15: if a proxy answers with an error in place of a tunnel, the file is downloaded later."""
    async with (
        site(response(PNG)) as server,
        proxy(server.port, answer=answer) as between,
        downloader(tmp_path, between, None) as opened,
    ):
        with pytest.raises(MediaUnavailable) as caught:
            await opened.save(url=f"https://{HOST}/a.png", kind="image", stem="ab/00-image")
        assert caught.value.reason == "connect"
        assert "through the proxy" in str(caught.value) or "The proxy" in str(caught.value)
        assert "pr0xy" not in str(caught.value)


async def test_a_development_origin_bypasses_the_proxy(tmp_path: Path) -> None:
    """D5: this machine's loopback is reached without the proxy."""
    async with site(response(PNG)) as server, proxy(server.port) as between:
        opened = Downloader(
            hosts=MediaHosts.parse([server.origin]), storage=local_storage(tmp_path), proxy=between.url
        )
        await opened.save(url=f"{server.origin}/a.png", kind="image", stem="ab/00-image")
        await opened.close()
        assert between.heads == []


def test_an_invalid_authority_stops_the_start(tmp_path: Path) -> None:
    """D3: if RECEIVER_MEDIA_CA names no PEM file with certificates, the start fails and says so."""
    (tmp_path / "empty.pem").touch()
    (tmp_path / "text.pem").write_text("very-secret")
    key = make_certificate(tmp_path / "key.pem").read_text().partition("-----BEGIN CERT")[0]
    (tmp_path / "key.pem").write_text(key)
    for name in ("missing.pem", "empty.pem", "text.pem", "key.pem", ".", "a\0b"):
        with pytest.raises(SettingsError, match="RECEIVER_MEDIA_CA") as caught:
            open_tls(str(tmp_path / name))
        assert "very-secret" not in str(caught.value)


async def test_an_authority_is_trusted_beside_the_public_ones(tmp_path: Path) -> None:
    """D3: a private authority is trusted in addition to the public ones."""
    public = len(open_tls(None).get_ca_certs())
    authority = make_certificate(tmp_path / "authority.pem")
    assert len(open_tls(str(authority)).get_ca_certs()) >= public > 100


def open_settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    """Read settings from the environment."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Settings.load()


async def test_the_settings_reach_the_downloader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D5: the worker downloads with RECEIVER_MEDIA_PROXY and RECEIVER_MEDIA_CA."""
    async with tls_site(tmp_path, HOST, response(PNG)) as (server, ca), proxy(server.port) as between:
        settings = open_settings(monkeypatch, RECEIVER_MEDIA_PROXY=between.url, RECEIVER_MEDIA_CA=ca)
        assert "pr0xy" not in repr(settings)
        opened = Parts.make(settings).downloader
        await opened.save(url=f"https://{HOST}/a.png", kind="image", stem="ab/00-image")
        await opened.close()
        assert between.tunnel_hosts == [f"{HOST}:443"]


async def test_clipia_is_called_through_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D5: CLIPIA_PROXY gets Clipia's name, and the key goes through the tunnel only."""
    answer = response(json.dumps({"balance": {"credits": 7}}).encode(), "Content-Type: application/json")
    async with tls_site(tmp_path, API, answer) as (server, ca), proxy(server.port) as between:
        monkeypatch.setenv("SSL_CERT_FILE", ca)
        client = open_client(open_settings(monkeypatch, CLIPIA_KEY="clipia_live_x", CLIPIA_PROXY=between.url))
        assert client is not None
        call = Call()
        assert (await client.balance(call=call))["balance"] == {"credits": 7}
        await client.close()
        assert between.tunnel_hosts == [f"{API}:443"]
        assert b"clipia_live_x" not in b"".join(between.heads)
        assert call.may_have_left


@pytest.mark.parametrize(
    "answer", [*REFUSALS, None], ids=["403", "407", "502", "301", "junk", "cut", "silent"]
)
async def test_a_submission_without_a_tunnel_was_not_sent(
    answer: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: if a submission got no tunnel, it was not sent, and its key is used for no longer."""
    monkeypatch.setattr(client_module, "CALL_TIMEOUT_SECONDS", 5.0 if answer is not None else 0.5)
    async with site(b"") as server, proxy(server.port, answer=answer) as between:
        client = ClipiaClient("clipia_live_x", base_url=f"https://{API}", proxy=between.url)
        with pytest.raises(ClipiaUnavailable) as caught:
            await client.balance(call=Call())
        await client.close()
        assert (caught.value.may_have_arrived, caught.value.reason) == (False, "unreachable")
        assert "pr0xy" not in str(caught.value)
        assert "prox" in str(caught.value) or answer is None
        assert between.tunnel_hosts == [f"{API}:443"]


async def test_a_local_clipia_bypasses_the_proxy() -> None:
    """D5: plain http is for this machine, whose loopback is reached without the proxy."""
    answer = response(b"{}", "Content-Type: application/json")
    async with site(answer) as server, proxy(server.port) as between:
        client = ClipiaClient("clipia_live_x", base_url=server.origin, proxy=between.url)
        await client.balance(call=Call())
        await client.close()
        assert between.heads == []


@pytest.mark.parametrize("status", ["204 No Content", "500 Oops"])
async def test_a_destination_is_reached_through_its_proxy(tmp_path: Path, status: str) -> None:
    """E1: the event goes through the tunnel, and the tunnel's own 200 does not confirm it."""
    async with (
        tls_site(tmp_path, "orders.example", response(b"", status=status)) as (server, ca),
        proxy(server.port) as between,
    ):
        destination = open_destination(
            DestinationSettings(
                name="orders",
                url=SecretStr("https://orders.example/clipia"),
                tls=TlsSettings(ca=ca),
                proxy=SecretStr(between.url),
            )
        )
        await destination.start()
        try:
            if status.startswith("204"):
                await destination.publish(make_event())
            else:
                with pytest.raises(PublishFailed, match="answered 500"):
                    await destination.publish(make_event())
        finally:
            await destination.close()
        assert between.tunnel_hosts == ["orders.example:443"]
        assert server.requests[0].startswith(b"POST /clipia HTTP/1.1\r\n")


async def test_a_proxy_with_tls_is_not_the_destination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E14: the proxy's certificate is checked by the public authorities, the destination's by its own."""
    (tmp_path / "proxy").mkdir()
    of_proxy = make_certificate(tmp_path / "proxy" / "server.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(of_proxy)
    async with (
        tls_site(tmp_path, "orders.example", response(b"", status="204 No Content")) as (server, ca),
        proxy(server.port, tls=tls) as between,
    ):
        for trusted in (False, True):
            if trusted:
                monkeypatch.setenv("SSL_CERT_FILE", str(of_proxy))
            destination = open_destination(
                DestinationSettings(
                    name="orders",
                    url=SecretStr("https://orders.example/clipia"),
                    tls=TlsSettings(ca=ca),
                    proxy=SecretStr(between.url),
                )
            )
            if trusted:
                await destination.publish(make_event())
            else:
                with pytest.raises(PublishFailed, match="CERTIFICATE_VERIFY_FAILED"):
                    await destination.publish(make_event())
                assert between.heads == []
            await destination.close()
        assert between.tunnel_hosts == ["orders.example:443"]
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 201 Created\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nx: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
    ids=["201", "204", "long"],
)
async def test_any_2xx_opens_a_tunnel(tmp_path: Path, answer: bytes) -> None:
    """E4: a proxy may open a tunnel with any 2xx, and a long head."""
    async with (
        tls_site(tmp_path, "orders.example", response(b"", status="204 No Content")) as (server, ca),
        proxy(server.port, answer=answer) as between,
    ):
        destination = open_destination(
            DestinationSettings(
                name="orders",
                url=SecretStr("https://orders.example/clipia"),
                tls=TlsSettings(ca=ca),
                proxy=SecretStr(between.url),
            )
        )
        await destination.publish(make_event())
        await destination.close()
        assert len(server.requests) == 1


async def test_the_head_of_a_tunnel_has_our_name_and_no_secret(tmp_path: Path) -> None:
    """G8: the proxy learns its own login, the host and the receiver's name."""
    async with (
        tls_site(tmp_path, "orders.example", response(b"", status="204 No Content")) as (server, ca),
        proxy(server.port) as between,
    ):
        destination = open_destination(
            DestinationSettings(
                name="orders",
                url=SecretStr("https://user:cAnArY@orders.example/cAnArY?cAnArY"),
                tls=TlsSettings(ca=ca),
                proxy=SecretStr(between.url),
                headers={"X-Token": SecretStr("cAnArY")},
            )
        )
        await destination.publish(make_event())
        await destination.close()
        line, *fields = between.heads[0].decode().rstrip().split("\r\n")
        assert line == "CONNECT orders.example:443 HTTP/1.1"
        assert dict(field.split(": ", 1) for field in fields) == {
            "Host": "orders.example:443",
            "User-Agent": f"clipia-receiver/{__version__}",
            "Proxy-Authorization": "Basic " + base64.b64encode(b"proxy-user:pr0xy-password").decode(),
        }
        assert b"pr0xy" not in server.requests[0]


async def test_a_plain_destination_gets_its_request_from_the_proxy() -> None:
    """E1: with http: the proxy gets the whole URL and its own login, each time."""
    async with (
        site(response(b"", "Connection: close", status="204 No Content")) as server,
        proxy(server.port) as between,
    ):
        destination = open_destination(
            DestinationSettings(
                name="orders",
                url=SecretStr("http://user:word@orders.example:8080/clipia?a=%2f"),
                proxy=SecretStr(between.url),
            )
        )
        for _ in range(2):
            await destination.publish(make_event())
        await destination.close()
        for head in between.heads:
            line, *fields = head.decode().rstrip().split("\r\n")
            headers = dict(field.split(": ", 1) for field in fields)
            assert line == "POST http://orders.example:8080/clipia?a=%2f HTTP/1.1"
            assert headers["Host"] == "orders.example:8080"
            assert headers["Proxy-Authorization"].startswith("Basic ")
            assert headers["authorization"] == "Basic " + base64.b64encode(b"user:word").decode()


@pytest.mark.parametrize("answer", REFUSALS, ids=["403", "407", "502", "301", "junk", "cut"])
async def test_an_error_of_the_proxy_is_retried(answer: bytes) -> None:
    """E4: if the tunnel of an event is refused, the event is tried again and never becomes dead."""
    async with site(b"") as server, proxy(server.port, answer=answer) as between:
        destination = open_destination(
            DestinationSettings(
                name="orders",
                url=SecretStr("https://orders.example/clipia"),
                proxy=SecretStr(between.url),
            )
        )
        await destination.start()
        with pytest.raises(PublishFailed) as caught:
            await destination.publish(make_event())
        await destination.close()
        assert caught.value.reason == "connection"
        assert "pr0xy" not in str(caught.value)


async def test_proxies_of_the_environment_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: without a configured proxy no request to Clipia or a destination goes to HTTPS_PROXY."""
    async with site(b"") as server, proxy(server.port) as canary:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, canary.url)
        async with tls_site(tmp_path, "127.0.0.1", response(b"{}")) as (target, ca):
            monkeypatch.setenv("SSL_CERT_FILE", ca)
            client = ClipiaClient("clipia_live_x", base_url=f"https://127.0.0.1:{target.port}")
            await client.balance(call=Call())
            await client.close()
            destination = open_destination(
                DestinationSettings(
                    name="orders",
                    url=SecretStr(f"https://127.0.0.1:{target.port}/"),
                    tls=TlsSettings(ca=ca),
                )
            )
            await destination.start()
            await destination.publish(make_event())
            await destination.close()
            assert len(target.requests) == 2
        assert canary.heads == []


@pytest.mark.parametrize(
    "value",
    [
        "proxy.internal:3128",
        "socks5://u:very-secret@proxy.internal",
        "http://u:very-secret@",
        "http://u:very-secret@proxy.internal:99999",
        "http://u:very-secret@proxy.internal/path",
        "http://u:very-secret@proxy.internal?x=y",
        "http://u:very-secret#@proxy.internal",
        "http://[u:very-secret",
    ],
)
@pytest.mark.parametrize("variable", ["CLIPIA_PROXY", "RECEIVER_MEDIA_PROXY"])
def test_an_invalid_proxy_stops_the_start(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: the message names the setting and does not quote its value."""
    with pytest.raises(SettingsError, match=variable) as caught:
        open_settings(monkeypatch, **{variable: value})
    assert "very-secret" not in str(caught.value)


def test_a_proxy_is_for_http_destinations() -> None:
    """D5: if a destination's client would ignore a proxy, the setting is invalid."""
    with pytest.raises(ValueError, match="proxy are for http: and https: only"):
        DestinationSettings(
            name="a", url=SecretStr("redis://127.0.0.1"), proxy=SecretStr("http://127.0.0.1:3128")
        )


async def test_a_silent_proxy_delays_no_download_for_ever(tmp_path: Path) -> None:
    """D7: if a proxy does not answer, the time limit for the headers ends the download."""
    async with site(b"") as server, proxy(server.port, answer=None) as between:
        async with downloader(tmp_path, between, None) as opened:
            opened._limits = type(opened._limits)(header_seconds=0.3)
            async with asyncio.timeout(30):
                with pytest.raises(MediaUnavailable) as caught:
                    await opened.save(url=f"https://{HOST}/a.png", kind="image", stem="ab/00-image")
        assert caught.value.reason == "timeout"
