"""The API's specification as tests use it."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from receiver.app import create_app
from receiver.settings import Settings


def make_app(folder: Path) -> Starlette:
    """Return a receiver with both halves and without a worker."""
    settings = Settings.load(
        clipia_webhook_secret="whsec_test-0123456789abcdef",
        database_url=f"sqlite:///{folder / 'receiver.db'}",
    )
    return create_app(settings, worker=False)


async def fetch(app: Starlette, path: str) -> httpx.Response:
    """Get a document without a token."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://receiver") as client:
        return (await client.get(path)).raise_for_status()


def read_specification(folder: Path) -> dict[str, Any]:
    """Return the document as it is served."""
    found: dict[str, Any] = asyncio.run(fetch(make_app(folder), "/openapi.json")).json()
    return found


def closed(schema: Any) -> Any:
    """Return a schema that allows no field that it does not name; the document itself leaves room."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and isinstance(schema["properties"], dict) and "type" in schema:
        found.setdefault("additionalProperties", False)
    return found
