#!/usr/bin/env bash
# mcp's MCPServer drops arguments that a tool does not have, and the tool runs without them.
#
# The schema that clients get does not say additionalProperties: false, and the model that checks a call ignores what it
# does not know. A model that misspells an optional limit, such as max_cst for max_cost, gets no error: the tool runs
# without the limit. The lower Server leaves the check of arguments to its handler.
#
# Exits with 0 if it behaves like this, with 1 if it no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check mcp==2.3.0
cat > "$folder/call.py" <<'PYTHON'
import asyncio
import platform
import sys
from importlib.metadata import version

from mcp import Client
from mcp.server import MCPServer

server = MCPServer("shop")


@server.tool()
def buy(thing: str, max_cost: float | None = None) -> str:
    """Buy a thing."""
    return f"bought {thing}, max_cost={max_cost}"


async def main() -> int:
    async with Client(server) as client:
        (tool,) = (await client.list_tools()).tools
        result = await client.call_tool("buy", {"thing": "a cat", "max_cst": 1})
    print(f"Python {platform.python_version()}, mcp {version('mcp')}")
    print("schema:", tool.input_schema)
    print("max_cst=1:", "error" if result.is_error else "no error", result.structured_content)
    ran = result.structured_content == {"result": "bought a cat, max_cost=None"}
    is_so = ran and tool.input_schema.get("additionalProperties") is not False
    print("as described" if is_so else "NOT as described any more")
    return 0 if is_so else 1


sys.exit(asyncio.run(main()))
PYTHON
"$folder/venv/bin/python" "$folder/call.py"
