"""The texts of real errors."""

import asyncio
import shutil
import sqlite3
import ssl
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis
from support.certificates import make_certificate
from support.servers import Postgres, free_port

from receiver.db import error_texts as database_texts
from receiver.db.database import Database
from receiver.error_texts import cause
from receiver.errors import DatabaseUnavailable


async def _dial(host: str, port: int) -> None:
    await asyncio.open_connection(host, port)


async def _get(url: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        await client.get(url)


async def _ping(port: int) -> None:
    async with Redis(host="localhost", port=port) as client:
        await client.ping()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda port: _dial("127.0.0.1", port), "ConnectionRefusedError"),
        # If both addresses fail, Python joins the texts and drops the error numbers.
        (lambda port: _dial("localhost", port), None),
        (lambda port: _get(f"http://localhost:{port}"), "ConnectError"),
        (_ping, "ConnectionError"),
    ],
    ids=["asyncio", "two addresses", "httpx", "redis"],
)
async def test_a_refused_connection_has_a_text(
    call: Callable[[int], Awaitable[None]], name: str | None
) -> None:
    """A refused connection has the same text for every client, and the class of the client's exception."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each client has its own
        await call(free_port())
    assert cause(caught.value).endswith(": connection refused: does a server listen there?")
    assert name is None or cause(caught.value).startswith(f"{name}: ")


async def test_a_name_that_is_not_found_has_a_text() -> None:
    """A host name without an address has a text."""
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await _dial("no-such-host.invalid", 443)
    assert cause(caught.value) == "gaierror: the host name was not found"


async def test_an_untrusted_certificate_has_a_text(tmp_path: Path) -> None:
    """An untrusted certificate has its own text, which differs from other connection errors."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(make_certificate(tmp_path / "server.pem"))
    server = await asyncio.start_server(
        lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=server_side
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(httpx.ConnectError) as caught:
            await _get(f"https://127.0.0.1:{port}")
    assert cause(caught.value) == (
        "ConnectError: the TLS certificate is self-signed and not trusted (CERTIFICATE_VERIFY_FAILED)"
    )


def test_a_slow_answer_has_a_text() -> None:
    """A timeout has the same text for every library."""
    assert cause(httpx.ReadTimeout("secret")) == "ReadTimeout: no answer in time"
    assert cause(TimeoutError("secret")) == "TimeoutError: no answer in time"


def test_an_unknown_error_is_its_class_alone() -> None:
    """An unknown error is shown by its class; the library's text, which may quote a password, is left out."""
    assert cause(httpx.LocalProtocolError("Illegal header value b'Bearer secret\\n'")) == "LocalProtocolError"
    circular = ValueError("secret")
    circular.__cause__ = circular
    assert cause(circular) == "ValueError"


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (
            lambda path: path.mkdir(),
            "cannot open its file: check the folder and its permissions (SQLITE_CANTOPEN)",
        ),
        (lambda path: path.write_bytes(b"x" * 4096), "the file is not an SQLite database (SQLITE_NOTADB)"),
    ],
    ids=["folder", "other file"],
)
def test_sqlite_errors_have_texts(tmp_path: Path, prepare: Callable[[Path], object], words: str) -> None:
    """SQLite's error codes have texts."""
    prepare(tmp_path / "receiver.db")
    with pytest.raises(sqlite3.Error) as caught, closing(sqlite3.connect(tmp_path / "receiver.db")) as opened:
        opened.execute("SELECT * FROM sqlite_master")
    assert database_texts.cause(caught.value) == words


async def test_a_wrong_password_of_postgresql_has_a_text(postgres: Postgres) -> None:
    """A wrong password of PostgreSQL has a text without the user, the database and the password."""
    rules = postgres.data / "pg_hba.conf"
    shutil.copy(rules, rules.with_suffix(".saved"))
    postgres.sql("CREATE ROLE canary_user LOGIN PASSWORD 'right'")
    rules.write_text("host all canary_user 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    postgres.sql("SELECT pg_reload_conf()")
    database = Database(f"postgresql://canary_user:canary-password@127.0.0.1:{postgres.port}/canary_base")
    try:
        with pytest.raises(DatabaseUnavailable) as caught:
            async with database.read():
                pass
    finally:
        await database.close()
        rules.write_text(rules.with_suffix(".saved").read_text())
        postgres.sql("SELECT pg_reload_conf()")
    assert str(caught.value) == (
        "the database is unavailable: PostgreSQL rejects the user or the password of RECEIVER_DATABASE_URL "
        "(InvalidPasswordError, SQLSTATE 28P01)"
    )


async def test_a_missing_database_has_a_text(postgres: Postgres) -> None:
    """PostgreSQL's SQLSTATEs have texts."""
    database = Database(f"postgresql://postgres@127.0.0.1:{postgres.port}/canary_base")
    with pytest.raises(DatabaseUnavailable, match=r"the database does not exist \(.*SQLSTATE 3D000\)"):
        async with database.read():
            pass
    await database.close()
