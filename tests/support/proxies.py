"""An HTTP proxy for tests: for every request it connects to one server of this machine."""

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

END_OF_HEAD = b"\r\n\r\n"


@dataclass(kw_only=True)
class Proxy:
    """The port of the proxy, and the heads of the requests that it got."""

    port: int
    scheme: str
    heads: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its URL, with a password."""
        return f"{self.scheme}://proxy-user:pr0xy-password@127.0.0.1:{self.port}"

    @property
    def tunnel_hosts(self) -> list[str]:
        """The hosts of the requested tunnels."""
        return [head.split()[1].decode() for head in self.heads if head.startswith(b"CONNECT ")]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _ended(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@asynccontextmanager
async def proxy(
    target: int,
    *,
    answer: bytes | None = b"HTTP/1.1 200 Connection established\r\n\r\n",
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Proxy]:
    """Run a proxy whose tunnels all lead to a port; if `answer` is None, it never answers.

    Other requests than for a tunnel are passed on unchanged.
    """
    running = Proxy(port=0, scheme="http" if tls is None else "https")
    meetings: set[asyncio.Task[None]] = set()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(END_OF_HEAD)
        except asyncio.IncompleteReadError:
            return
        running.heads.append(head)
        if answer is None:
            await asyncio.Event().wait()
        if head.startswith(b"CONNECT "):
            writer.write(answer or b"")
            await writer.drain()
            if not re.search(rb"HTTP/1.1 2", answer or b""):
                return
        answers, server = await asyncio.open_connection("127.0.0.1", target)
        try:
            if not head.startswith(b"CONNECT "):
                server.write(head)
            await asyncio.gather(_pump(reader, server), _pump(answers, writer))
        finally:
            await _ended(server)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        meetings.add(task := asyncio.ensure_future(meet(reader, writer)))
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await task
        await _ended(writer)

    async with await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls) as listener:
        running.port = listener.sockets[0].getsockname()[1]
        try:
            yield running
        finally:
            for task in meetings:
                task.cancel()
            await asyncio.gather(*meetings, return_exceptions=True)
