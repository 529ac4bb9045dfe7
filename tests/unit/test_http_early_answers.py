"""HTTP destinations whose server answers before it has read the event, or that are closed meanwhile."""

import asyncio
import contextlib
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import uvloop
from pydantic import SecretStr
from support.certificates import make_certificate
from support.kinds_base import make_event

from receiver.destination_settings import DestinationSettings, TlsSettings
from receiver.destinations import Destination, base, open_destination
from receiver.errors import PublishFailed, PublishRejected
from receiver.http_transport import _drop_frames

SECONDS = 20
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
LARGE = make_event({"text": "x" * 8_000_000})
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

Run: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]
Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


@pytest.fixture(params=list(LOOPS.values()), ids=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a test on each event loop, in bounded time."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield lambda test: runner.run(asyncio.wait_for(test, SECONDS))


@contextlib.asynccontextmanager
async def served(serve: Serve, *, folder: Path | None = None) -> AsyncIterator[Destination]:
    """Open a destination whose server gets the length of each body; with TLS if there is a folder."""
    serving: set[asyncio.Task[Any]] = set()
    tls = ca = None
    if folder is not None:
        ca = make_certificate(folder / "server.pem")
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(ca)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                assert length is not None
                await serve(reader, writer, int(length[1]))
        writer.transport.abort()

    listener = socket.socket()
    # So that the client's own buffers are used.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(answer, sock=listener, ssl=tls)
    scheme, port = "http" if tls is None else "https", listener.getsockname()[1]
    url = SecretStr(f"{scheme}://127.0.0.1:{port}/events")
    destination = open_destination(
        DestinationSettings(name="orders", url=url, tls=TlsSettings(ca=str(ca)) if ca else None)
    )
    try:
        yield destination
    finally:
        await destination.close()
        server.close()
        await asyncio.wait(serving, timeout=5)
        # The loop reports the end of an aborted connection later.
        await asyncio.sleep(0.05)


ANSWERS = {
    "kept": OK,
    "close": OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
    "half closed": OK,
}


# asyncio's TLS has no half-closed connections.
@pytest.mark.parametrize(
    ("kind", "is_tls"), [(kind, is_tls) for kind in ANSWERS for is_tls in (False, True)][:-1]
)
def test_an_event_that_is_confirmed_early_arrives_whole(
    run: Run, tmp_path: Path, kind: str, *, is_tls: bool
) -> None:
    """E4: if a server answers 200 before it reads the event, the event is sent to its end nevertheless."""

    async def test() -> None:
        arrived = asyncio.Event()

        async def read_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int) -> None:
            writer.write(ANSWERS[kind])
            if kind == "half closed":
                writer.write_eof()
            await asyncio.sleep(0.3)
            await reader.readexactly(length)
            arrived.set()
            await reader.read()

        async with served(read_later, folder=tmp_path if is_tls else None) as destination:
            await destination.publish(LARGE)
            await destination.close()
            await asyncio.wait_for(arrived.wait(), 2)

    run(test())


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("answer", [OK, OK.replace(b"content-length: 0", b"bad name: 0")])
def test_an_event_that_is_never_read_is_not_delivered(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, *, is_tls: bool
) -> None:
    """E4: a 200 for an event that is not sent to its end within the attempt's time is no confirmation."""
    monkeypatch.setattr(base, "TIMEOUT_SECONDS", 1.0)

    async def test() -> None:
        async def read_nothing(
            _reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _length: int
        ) -> None:
            writer.write(answer)
            await asyncio.sleep(2)
            writer.transport.abort()

        async with served(read_nothing, folder=tmp_path if is_tls else None) as destination:
            with pytest.raises(PublishFailed) as caught:
                await destination.publish(LARGE)
            assert caught.value.reason == ("timeout" if answer == OK else "protocol")

    run(test())


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
def test_no_event_waits_behind_a_rejected_one(run: Run, tmp_path: Path, *, is_tls: bool) -> None:
    """E5: after an early 413, the connection with the rest of the event is not used again."""

    async def test() -> None:
        lengths: list[int] = []

        async def reject_large(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int
        ) -> None:
            lengths.append(length)
            if length > 1_000_000:
                writer.write(OK.replace(b"200 OK", b"413 Large"))
                await asyncio.sleep(1)
                writer.transport.abort()
            else:
                await reader.readexactly(length)
                writer.write(OK)

        async with served(reject_large, folder=tmp_path if is_tls else None) as destination:
            with pytest.raises(PublishRejected):
                await destination.publish(LARGE)
            await asyncio.wait_for(destination.publish(make_event()), 0.8)
            assert len(lengths) == 2

    run(test())


def test_a_head_without_an_end_is_cut(run: Run) -> None:
    """E1: a head of an answer is read up to 128 KiB, however long its fields and however many they are."""

    async def test() -> None:
        sent = 0

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int) -> None:
            nonlocal sent
            await reader.readexactly(length)
            writer.write(b"HTTP/1.1 503 No\r\n")
            for number in range(900):
                writer.write(b"x%d: %b\r\n" % (number, b"a" * 99_000))
                await writer.drain()
                sent = number
            await asyncio.sleep(SECONDS)

        async with served(flood) as destination:
            with pytest.raises(PublishFailed, match="answered 503"):
                await destination.publish(make_event())
            await asyncio.sleep(0.1)
            # The kernel's buffers take some.
            assert sent < 200

    run(test())


def test_each_close_waits_for_the_exchanges(run: Run) -> None:
    """E16: a second close during the first cuts no exchange either, and a cancelled one does not end it."""

    async def test() -> None:
        async def answer_late(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int
        ) -> None:
            await reader.readexactly(length)
            await asyncio.sleep(0.5)
            writer.write(OK)

        async with served(answer_late) as destination:
            start = time.monotonic()
            publishing = asyncio.create_task(destination.publish(make_event()))
            await asyncio.sleep(0.1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(destination.close(), 0.05)
            with pytest.raises(PublishFailed):
                await destination.publish(make_event())
            await asyncio.gather(destination.close(), destination.close())
            assert publishing.done()
            await publishing
            assert 0.4 < time.monotonic() - start < 3

    run(test())


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
def test_an_end_in_the_handshake_is_named(run: Run, *, is_reset: bool) -> None:
    """E4: if the other side ends the connection in the TLS handshake, the failure says so."""

    async def test() -> None:
        async def end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1 if is_reset else 65_536)
            writer.close()

        server = await asyncio.start_server(end, "127.0.0.1", 0, limit=1)
        url = SecretStr(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/events")
        destination = open_destination(DestinationSettings(name="orders", url=url))
        with pytest.raises(PublishFailed, match=r"TLS failed \(UNEXPECTED_EOF|cut the connection") as caught:
            await destination.publish(make_event())
        assert is_reset or "TLS failed" in str(caught.value)
        await destination.close()
        server.close()

    run(test())


def test_a_cycle_of_causes_ends() -> None:
    """An exception can be a cause of its own cause."""
    first, second = OSError(), OSError()
    first.__cause__, second.__cause__ = second, first
    _drop_frames(first)
