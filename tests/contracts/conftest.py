"""Fixtures of the contract tests."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest


@pytest.fixture
async def no_stray_failures() -> AsyncIterator[None]:
    """Fail the test if the event loop is told of a failure that no caller took."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: found.append(context))
    yield
    await asyncio.sleep(0)
    gc.collect()
    assert found == []
