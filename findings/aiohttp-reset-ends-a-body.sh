#!/usr/bin/env bash
# aiohttp takes a connection reset for the end of a body.
#
# A body without Content-Length and without chunks ends when the connection is closed. A reset (RST) is no close: the
# kernel reports an error and may have dropped bytes. aiohttp's client gets that error, ends the body nevertheless, and
# `read` returns the part that has arrived as if it were all. httpx raises ReadError for the same answer.
#
# Exits with 0 if it behaves like this, with 1 if it no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check aiohttp==3.14.5 httpx==0.28.1
cat > "$folder/read.py" <<'PYTHON'
import asyncio
import platform
import socket
import struct
import sys
from importlib.metadata import version

import aiohttp
import httpx

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(HEAD + b"half of the cont")
    await writer.drain()
    await asyncio.sleep(0.3)
    # With a linger time of 0, a close sends RST.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def by_aiohttp(url: str) -> str:
    async with aiohttp.ClientSession(trust_env=False) as session:
        try:
            async with session.post(url) as response:
                return f"returned {await response.read()!r}"
        except aiohttp.ClientError as error:
            return f"raised {type(error).__name__}"


async def by_httpx(url: str) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            return f"returned {(await client.post(url)).content!r}"
        except httpx.HTTPError as error:
            return f"raised {type(error).__name__}"


async def main() -> int:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    outcomes = {"aiohttp": await by_aiohttp(url), "httpx": await by_httpx(url)}
    server.close()
    print(f"Python {platform.python_version()}, aiohttp {version('aiohttp')}, httpx {version('httpx')}")
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    is_so = outcomes == {"aiohttp": "returned b'half of the cont'", "httpx": "raised ReadError"}
    print("as described" if is_so else "NOT as described any more")
    return 0 if is_so else 1


sys.exit(asyncio.run(main()))
PYTHON
"$folder/venv/bin/python" "$folder/read.py"
