"""The servers with which the receiver is compared, on the same uvicorn with the same settings.

    python benchmarks/sides.py bare --port 8001       reads the body and answers 200
    python benchmarks/sides.py naive --port 8001      follows Clipia's documentation
    python benchmarks/sides.py ungrouped --port 8001  the receiver, with a transaction for each webhook

The naive handler is a FastAPI application: it verifies with the official SDK and selects the event. If there
is none, it inserts one and commits, in a session of SQLAlchemy's, with the database's durable settings. It
keeps no receipt, no metrics and no log.
"""

import argparse
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import clipia
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from sqlalchemy import URL, DateTime, String, event, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from receiver import cli as receiver
from receiver import ingest
from receiver.db.urls import parse_url


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


class Base(DeclarativeBase):
    """The tables of the naive handler."""


class Result(Base):
    """A received webhook."""

    __tablename__ = "results"

    request_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    body: Mapped[bytes]
    received_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


def _make_durable(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def naive() -> FastAPI:
    """Return the handler that the documentation suggests."""
    secret = os.environ["CLIPIA_WEBHOOK_SECRET"]
    url = parse_url(os.environ["RECEIVER_DATABASE_URL"])
    if isinstance(url, URL):
        engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"), connect_args={"timeout": 2})
        event.listen(engine.sync_engine, "connect", _make_durable)
        event.listen(engine.sync_engine, "begin", lambda each: each.exec_driver_sql("BEGIN IMMEDIATE"))
    else:
        engine = create_async_engine(
            "postgresql+asyncpg://", connect_args=url.arguments, pool_size=10, max_overflow=0
        )
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/clipia/webhook")
    async def webhook(request: Request) -> dict[str, str]:
        body = await request.body()
        if not clipia.verify_signature(secret, request.headers, body):
            raise HTTPException(401, "invalid signature")
        request_id = json.loads(body)["request_id"]
        async with sessions() as session:
            known = await session.scalar(select(Result.request_id).where(Result.request_id == request_id))
            if known is None:
                session.add(Result(request_id=request_id, body=body, received_at=datetime.now(UTC)))
                await session.commit()
        return {"status": "accepted"}

    return app


def main() -> None:
    """Serve one side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=["bare", "naive", "ungrouped"])
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    if options.side == "ungrouped":
        ingest.MAX_BATCH_WEBHOOKS = 1  # type: ignore[misc]  # a constant changed on purpose
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
