#!/usr/bin/env bash
# On asyncio `transport.write_eof()` raises OSError if the client has gone; on uvloop it does not.
#
# A transport reports a lost connection to `connection_lost`, and `write` and `close` never raise because of one. But
# asyncio's `write_eof` calls `shutdown` on the socket at once. If the client has closed its socket and the event loop has
# not looked at it yet, the answer before it has made the client's kernel reset the connection, and `shutdown` fails with
# ENOTCONN in the caller. uvloop shuts the socket down later and raises nothing, so a server that half-closes a connection
# after its last answer works on uvloop and fails on asyncio.
#
# Exits with 0 if it behaves like this, with 1 if it no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uvloop==0.23.0
cat > "$folder/close.py" <<'PYTHON'
import asyncio
import errno
import platform
import socket
import sys
import time
from importlib.metadata import version

import uvloop


async def half_close() -> str:
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[asyncio.Transport] = loop.create_future()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.set_result(transport)

    server = await loop.create_server(Server, "127.0.0.1", 0)
    client = socket.create_connection(server.sockets[0].getsockname())
    transport = await accepted
    client.close()
    transport.write(b"answer")
    time.sleep(0.1)  # the reset arrives, and the event loop has not run
    try:
        transport.write_eof()
        outcome = "no error"
    except OSError as error:
        outcome = errno.errorcode[error.errno]
    await asyncio.sleep(0.1)
    server.close()
    return outcome


outcomes = {"asyncio": asyncio.run(half_close()), "uvloop": uvloop.run(half_close())}
print(f"Python {platform.python_version()}, uvloop {version('uvloop')}, {platform.system()}")
for name, outcome in outcomes.items():
    print(f"write_eof on {name}: {outcome}")
is_so = outcomes == {"asyncio": "ENOTCONN", "uvloop": "no error"}
print("as described" if is_so else "NOT as described any more")
sys.exit(0 if is_so else 1)
PYTHON
"$folder/venv/bin/python" "$folder/close.py"
# Seen: Python 3.11.7, uvloop 0.23.0, Linux; write_eof on asyncio: ENOTCONN; write_eof on uvloop: no error.
