"""The servers that ours is measured against, on the same uvicorn with the same settings.

    python benchmarks/sides.py bare --port 8001       reads the body and answers 200
    python benchmarks/sides.py naive --port 8001      what one writes from Clipia's documentation
    python benchmarks/sides.py ungrouped --port 8001  ours, with a transaction for each webhook

The naive one verifies with the official SDK, looks the event up, inserts it and commits, through SQLAlchemy's
async engine, with the database's durable settings. It keeps no receipt, no metrics and no log.
"""

import argparse
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import clipia
import orjson
import uvicorn
from sqlalchemy import Column, DateTime, LargeBinary, MetaData, String, Table, insert, select
from sqlalchemy.ext.asyncio import create_async_engine
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from receiver import cli as receiver
from receiver import ingest
from receiver.db.engine import parse_url, sqlite_engine


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """Read a body and answer it."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", b"21")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"status":"accepted"}'})


def naive() -> Starlette:
    """Return the handler that the documentation suggests."""
    secret = os.environ["CLIPIA_WEBHOOK_SECRET"]
    url = parse_url(os.environ["RECEIVER_DATABASE_URL"])
    if url.get_backend_name() == "sqlite":
        engine = sqlite_engine(url, pool_size=5, begin="BEGIN IMMEDIATE")
    else:
        engine = create_async_engine(url, pool_size=10, max_overflow=0)
    metadata = MetaData()
    results = Table(
        "results",
        metadata,
        Column("request_id", String(128), primary_key=True),
        Column("body", LargeBinary, nullable=False),
        Column("received_at", DateTime(timezone=True), nullable=False),
    )

    async def webhook(request: Request) -> Response:
        body = await request.body()
        if not clipia.verify_signature(secret, dict(request.headers), body):
            return JSONResponse({"error": "invalid signature"}, 401)
        request_id = orjson.loads(body)["request_id"]
        async with engine.begin() as connection:
            known = await connection.execute(
                select(results.c.request_id).where(results.c.request_id == request_id)
            )
            if known.first() is None:
                now = datetime.now(UTC)
                await connection.execute(
                    insert(results).values(request_id=request_id, body=body, received_at=now)
                )
        return JSONResponse({"status": "accepted"})

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        yield
        await engine.dispose()

    return Starlette(routes=[Route("/clipia/webhook", webhook, methods=["POST"])], lifespan=lifespan)


def main() -> None:
    """Serve one side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=["bare", "naive", "ungrouped"])
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    if options.side == "ungrouped":
        ingest.LARGEST_GROUP = 1  # type: ignore[misc]
        sys.argv = ["receiver", "serve", "--no-worker", "--port", str(options.port)]
        receiver.main()
        return
    uvicorn.run(
        bare if options.side == "bare" else naive(),
        port=options.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
    )


if __name__ == "__main__":
    main()
