"""Servers that reject a login or a request and repeat it, and a search for secrets in the results."""

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from urllib.parse import quote

PASSWORD = "cAnArY8f3b61d2e9b7c4"
TOKEN = "tOkEn0a1b2c3d4e5f6g7"

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk, *, seconds: float = 10) -> AsyncIterator[int]:
    """Serve each connection by `talk`; yield the port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(seconds):
                await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def redis_repeats(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each command with an error that contains the whole command."""
    while data := await reader.read(4096):
        said = data.decode(errors="replace").replace("\r\n", " ")
        commands = len(re.findall(rb"\*[0-9]+\r\n", data))
        writer.write(f"-ERR unknown command {said}\r\n".encode() * commands)


async def nats_repeats(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reject the login with an error that contains it."""
    writer.write(b'INFO {"server_id":"x","version":"2.9.0","max_payload":1048576,"auth_required":true}\r\n')
    login = (await reader.readline()).decode().strip().replace("'", "")
    writer.write(f"-ERR 'Not welcome: {login}'\r\n".encode())
    await writer.drain()


async def amqp_repeats(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reject the login with an error that contains the password, plain and in base64."""

    def method(channel: int, content: bytes) -> bytes:
        return b"\x01" + channel.to_bytes(2, "big") + len(content).to_bytes(4, "big") + content + b"\xce"

    def long(text: bytes) -> bytes:
        return len(text).to_bytes(4, "big") + text

    await reader.readexactly(8)
    start = b"\x00\x0a\x00\x0a\x00\x09" + long(b"") + long(b"PLAIN") + long(b"en_US")
    writer.write(method(0, start))
    await reader.read(4096)
    encoded = base64.b64encode(f"\0user\0{PASSWORD}".encode()).decode()
    text = f"ACCESS_REFUSED - no {PASSWORD}, {encoded}"[:255].encode()
    close = b"\x00\x0a\x00\x32" + (403).to_bytes(2, "big") + bytes([len(text)]) + text + bytes(4)
    writer.write(method(0, close))
    await writer.drain()
    await reader.read(4096)


async def http_repeats(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer 400 with the request's head as reason and body, and garbage to the second request."""
    head = await reader.readuntil(b"\r\n\r\n")
    said = head.replace(b"\r\n", b" ")
    writer.write(b"HTTP/1.1 500 " + said[:200] + b"\r\nx: " + said + b"\r\ncontent-length: 0\r\n\r\n")
    await writer.drain()


async def http_babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with the request's head in place of a status line."""
    writer.write(await reader.readuntil(b"\r\n\r\n"))
    await writer.drain()


async def hang_up(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Close the connection at once."""


PEERS: dict[str, tuple[str, Talk]] = {
    "redis": ("redis://user:{password}@127.0.0.1:{port}/0?stream=s", redis_repeats),
    "redis hangs up": ("redis://user:{password}@127.0.0.1:{port}/0?stream=s", hang_up),
    "nats": ("nats://user:{password}@127.0.0.1:{port}?subject=s.x", nats_repeats),
    "nats token": ("nats://{password}@127.0.0.1:{port}?subject=s.x", nats_repeats),
    "nats hangs up": ("nats://user:{password}@127.0.0.1:{port}?subject=s.x", hang_up),
    "rabbitmq": ("amqp://user:{password}@127.0.0.1:{port}/?queue=q", amqp_repeats),
    "rabbitmq hangs up": ("amqp://user:{password}@127.0.0.1:{port}/?queue=q", hang_up),
    "kafka hangs up": (
        "kafka://user:{password}@127.0.0.1:{port}/topic?security=sasl_plain&mechanism=plain",
        hang_up,
    ),
    "http": ("http://user:{password}@127.0.0.1:{port}/in?key={password}", http_repeats),
    "http babbles": ("http://user:{password}@127.0.0.1:{port}/in?key={password}", http_babbles),
    "sqs": (
        "sqs://127.0.0.1:{port}/123456789012/q?endpoint=http://127.0.0.1:{port}&region=x-1",
        http_repeats,
    ),
}


async def s3_repeats(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reject the request like S3, which repeats the signed headers."""
    head = await reader.readuntil(b"\r\n\r\n")
    body = b"<Error><Code>SignatureDoesNotMatch</Code><StringToSign>" + head + b"</StringToSign></Error>"
    writer.write(b"HTTP/1.1 403 Forbidden\r\nconnection: close\r\n")
    writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


def assert_hidden(text: str, *secrets: str) -> None:
    """Assert that a text contains no half of a secret, encoded or not."""
    for secret in secrets or (PASSWORD, TOKEN):
        for form in _forms(secret):
            assert form[:10] not in text, f"{form[:10]} in {text[:20_000]}"
            assert form[-10:] not in text, f"{form[-10:]} in {text[:20_000]}"


def _forms(secret: str) -> Iterator[str]:
    yield secret
    yield quote(secret, safe="")
    for before in (b"", b"user:", b"\0user\0"):
        encoded = base64.b64encode(before + secret.encode()).decode().rstrip("=")
        # The text before the secret is not secret, but shares a character with it.
        yield encoded[-(-len(before) * 4 // 3) + 1 : -2]
