"""One client process of the race: posts every id many times in parallel and counts the answers.

It uses plain sockets: a full HTTP client would take more of the processor than the receivers.
"""

import asyncio
import json
import sys
from collections import Counter

from support.payloads import body, signed

CONCURRENCY = 32


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> str:
    """Send one request on a kept-alive connection, and return the answer as `status outcome`."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    answer = json.loads(await reader.readexactly(length))
    return f"{head.split()[1]} {answer.get('status')}"


async def main(ids: int, ports: list[int]) -> None:
    """Post each of `ids` events CONCURRENCY times in parallel, alternating between the ports."""
    connections = [
        await asyncio.open_connection("127.0.0.1", ports[number % len(ports)])
        for number in range(CONCURRENCY)
    ]
    answers: Counter[str] = Counter()
    for number in range(ids):
        content = body(f"race-{number}", payload={"model": "m", "output": {}, "cost": 1})
        headers = signed(content) | {"Host": "receiver", "Content-Length": str(len(content))}
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"POST /clipia/webhook HTTP/1.1\r\n{fields}\r\n".encode() + content
        answers.update(await asyncio.gather(*(post(*connection, request) for connection in connections)))
    for _, writer in connections:
        writer.close()
    sys.stdout.write(json.dumps(answers))


asyncio.run(main(int(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
