"""Downloads over TLS: the address is pinned, the name stays in the handshake and in the request."""

import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpcore
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.media import PNG, Site, local_storage, response, site, stored_files

from receiver.errors import MediaBlocked, MediaUnavailable
from receiver.media import Downloader, MediaHosts
from receiver.media.network import GuardedNetwork
from receiver.media.pools import open_pool
from receiver.media.streams import LargeReads

HOST, PUBLIC = "media.clipia.ai", "93.184.215.14"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def write(self, path: Path) -> Path:
        """Write both to a PEM file."""
        key = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path.write_bytes(key + self.certificate.public_bytes(serialization.Encoding.PEM))
        return path


def issue(name: str, issuer: Identity | None = None) -> Identity:
    """Make a certificate authority, or a server's certificate signed by one."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    signer = issuer.key if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    else:
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(usage, critical=True)
    return Identity(key=key, certificate=builder.sign(signer, hashes.SHA256()))


@dataclass(kw_only=True)
class Internet(httpcore.AsyncNetworkBackend):
    """A network in which every public address is the test's server. A lookup gets the next answer."""

    port: int
    answers: list[list[str]]
    lookups: list[str] = field(default_factory=list)
    connects: list[tuple[str, int]] = field(default_factory=list)

    async def resolve(self, host: str, port: int) -> list[str]:
        """Return the next answer."""
        self.lookups.append(host)
        return self.answers.pop(0)

    async def connect_tcp(
        self, host: str, port: int, *args: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the server; the stream reports the address that was requested."""
        self.connects.append((host, port))
        stream = await LargeReads().connect_tcp("127.0.0.1", self.port, *args, **options)
        known = stream.get_extra_info
        stream.get_extra_info = lambda info: (  # type: ignore[method-assign]  # replaced on purpose
            (host, port) if info == "server_addr" else known(info)
        )
        return stream


@dataclass(kw_only=True)
class World:
    """A TLS server, the downloader that trusts it, and the records of both."""

    server: Site
    internet: Internet
    downloader: Downloader
    server_names: list[str]


@contextlib.asynccontextmanager
async def world(
    folder: Path, *, name: str = HOST, trusted: bool = True, body: bytes = b"", answers: list[list[str]]
) -> AsyncIterator[World]:
    """Run a server whose certificate is for `name`."""
    authority = issue("A test authority")
    names: list[str] = []
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_tls.load_cert_chain(issue(name, authority).write(folder / "server.pem"))
    server_tls.sni_callback = lambda _socket, sent, _context: names.append(sent)
    client_tls = ssl.create_default_context()
    if trusted:
        client_tls.load_verify_locations(authority.write(folder / "authority.pem"))
    hosts = MediaHosts.parse([HOST])
    async with site(body or response(PNG), tls=server_tls) as server:
        internet = Internet(port=server.port, answers=answers)
        downloader = Downloader(hosts=hosts, storage=local_storage(folder))
        network = GuardedNetwork(hosts, resolve=internet.resolve, dial=internet)
        downloader._pool = open_pool(network, client_tls)
        yield World(server=server, internet=internet, downloader=downloader, server_names=names)
        await downloader.close()


async def save(world: World) -> None:
    """Download an image."""
    await world.downloader.save(url=f"https://{HOST}/works/a.png", kind="image", stem="ab/00-image")


async def test_the_name_stays_while_the_address_is_pinned(tmp_path: Path) -> None:
    """D3: one lookup, one connection to its answer; server name, certificate and Host are the name's."""
    async with world(tmp_path, answers=[[PUBLIC]]) as here:
        await save(here)
        assert here.internet.lookups == [HOST]
        assert here.internet.connects == [(PUBLIC, 443)]
        assert here.server_names == [HOST]
        assert f"\r\nHost: {HOST}\r\n".encode() in here.server.requests[0]
    assert stored_files(tmp_path / "media") == {"ab/00-image.png": PNG}


async def test_a_rebound_name_is_not_followed(tmp_path: Path) -> None:
    """D3: a second, private answer is never used for the first download, and blocks the next one."""
    async with world(tmp_path, answers=[[PUBLIC], ["127.0.0.1"]]) as here:
        await save(here)
        assert here.internet.lookups == [HOST]
        with pytest.raises(MediaBlocked) as caught:
            await save(here)
        assert caught.value.reason == "address"
        assert here.internet.connects == [(PUBLIC, 443)]


@pytest.mark.parametrize("flaw", [{"name": "evil.example"}, {"trusted": False}], ids=["name", "authority"])
async def test_a_certificate_of_another_name_is_rejected(flaw: dict[str, Any], tmp_path: Path) -> None:
    """D3: with the address pinned, the certificate is still checked against the name."""
    async with world(tmp_path, answers=[[PUBLIC]], **flaw) as here:
        with pytest.raises(MediaUnavailable) as caught:
            await save(here)
        assert caught.value.reason == "connect"
        assert here.server.requests == []
    assert stored_files(tmp_path / "media") == {}


async def test_a_tls_connection_that_breaks_off_stores_no_file(tmp_path: Path) -> None:
    """D9: if bytes are missing at the end, this is noticed under TLS, too."""
    async with world(tmp_path, answers=[[PUBLIC]], body=response(PNG)[:-10]) as here:
        with pytest.raises(MediaUnavailable) as caught:
            await save(here)
        assert caught.value.reason == "truncated"
    assert stored_files(tmp_path / "media") == {}


async def test_a_proxy_of_the_environment_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D5: HTTPS_PROXY is ignored, and SSL_CERT_FILE does not replace the trusted authorities."""
    async with site(b"") as canary:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, canary.origin)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
        async with world(tmp_path, answers=[[PUBLIC]]) as here:
            await save(here)
            assert here.internet.connects == [(PUBLIC, 443)]
        assert canary.requests == []
