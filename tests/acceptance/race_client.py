"""One client process of the race: posts every id many times at once and prints how often each answer came."""

import asyncio
import json
import sys
from collections import Counter

import httpx
from payloads import body, signed

CONCURRENCY = 32


async def main(ids: int, urls: list[str]) -> None:
    """Post each of `ids` events CONCURRENCY times at once, in turns to the urls."""
    answers: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(timeout=30, limits=limits) as client:

        async def post(content: bytes, number: int) -> None:
            url = f"{urls[number % len(urls)]}/clipia/webhook"
            response = await client.post(url, content=content, headers=signed(content))
            answers[f"{response.status_code} {response.json().get('status')}"] += 1

        for number in range(ids):
            content = body(f"race-{number}", payload={"model": "m", "output": {}, "cost": 1})
            await asyncio.gather(*(post(content, copy) for copy in range(CONCURRENCY)))
    sys.stdout.write(json.dumps(answers))


asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
