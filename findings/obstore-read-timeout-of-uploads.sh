#!/usr/bin/env bash
# obstore's `read_timeout` ends an upload that makes progress all the time.
#
# By its documentation it holds for each single read and starts anew after one. An upload reads nothing before the answer,
# so the time runs from the start of the request: a small timeout that is meant to notice stalled connections limits the
# time of a whole upload (or of each part), and with it the size that can be uploaded over a slow line.
#
# Exits with 0 if it behaves like this, with 1 if it no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check obstore==0.12.1
cat > "$folder/upload.py" <<'PYTHON'
import asyncio
import platform
import sys
import time
from importlib.metadata import version

import obstore
from obstore.store import S3Store

READ_TIMEOUT = 2.0
SIZE = 4_500_000


async def main() -> int:
    reads: list[float] = []
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = 0
        try:
            await reader.readuntil(b"\r\n\r\n")
            while not is_over.is_set() and received < SIZE and (data := await reader.read(150_000)):
                received += len(data)
                reads.append(time.monotonic())
                await asyncio.sleep(0.2)
            writer.write(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\n\r\n')
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=65_536)
    port = server.sockets[0].getsockname()[1]
    store = S3Store(
        "bucket",
        config={
            "endpoint": f"http://127.0.0.1:{port}",
            "region": "us-east-1",
            "access_key_id": "test",
            "secret_access_key": "test",
        },
        client_options={"allow_http": True, "timeout": "60s", "read_timeout": f"{READ_TIMEOUT:.0f}s"},
        retry_config={"max_retries": 0},
    )
    started = time.monotonic()
    outcome = "stored"
    try:
        await obstore.put_async(store, "key", bytes(SIZE), use_multipart=False)
    except Exception as error:
        outcome = f"failed with {type(error).__name__}"
    took = time.monotonic() - started
    is_over.set()
    await asyncio.sleep(0.5)
    during = [moment for moment in reads if moment <= started + took]
    longest = max(after - before for before, after in zip(during, during[1:]))
    print(f"Python {platform.python_version()}, obstore {version('obstore')}, read_timeout {READ_TIMEOUT:.0f} s")
    print(f"upload of {SIZE} bytes: {outcome} after {took:.1f} s; the server read {len(during)} times until then, ")
    print(f"with {longest:.1f} s between two reads at most")
    server.close()
    is_so = outcome != "stored" and took < READ_TIMEOUT + 1 and longest < READ_TIMEOUT / 2
    print("as described" if is_so else "NOT as described any more")
    return 0 if is_so else 1


sys.exit(asyncio.run(main()))
PYTHON
"$folder/venv/bin/python" "$folder/upload.py"
