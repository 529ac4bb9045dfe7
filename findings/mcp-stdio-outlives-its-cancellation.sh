#!/usr/bin/env bash
# mcp's stdio_server does not end when it is cancelled, only with the next line of standard input.
#
# It reads standard input in a thread that anyio cannot abandon, so a cancelled server waits for that thread. A program
# that handles SIGTERM in its event loop, to close its database first, hangs until its client sends a line or hangs up;
# by then most clients have sent SIGKILL.
#
# Exits with 0 if it behaves like this, with 1 if it no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check mcp==2.3.0
cat > "$folder/serve.py" <<'PYTHON'
import asyncio
import contextlib
import signal
import sys

from mcp.server import MCPServer


async def main() -> None:
    serving = asyncio.create_task(MCPServer("shop").run_stdio_async())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    sys.stderr.write("started\n")
    with contextlib.suppress(asyncio.CancelledError):
        await serving


asyncio.run(main())
PYTHON
cat > "$folder/end.py" <<'PYTHON'
import platform
import subprocess
import sys
import time
from importlib.metadata import version

pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
process = subprocess.Popen([sys.executable, sys.argv[1]], **pipes)
process.stderr.readline()
time.sleep(1)
process.terminate()
try:
    process.wait(5)
    outcome = "ended after SIGTERM"
except subprocess.TimeoutExpired:
    outcome = "still there 5 s after SIGTERM"
process.stdin.write(b"\n")
process.stdin.flush()
try:
    process.wait(5)
    then = "ended with the next line"
except subprocess.TimeoutExpired:
    then = "still there after a line"
    process.kill()
print(f"Python {platform.python_version()}, mcp {version('mcp')}")
print(outcome)
print(then)
is_so = (outcome, then) == ("still there 5 s after SIGTERM", "ended with the next line")
print("as described" if is_so else "NOT as described any more")
sys.exit(0 if is_so else 1)
PYTHON
"$folder/venv/bin/python" "$folder/end.py" "$folder/serve.py"
