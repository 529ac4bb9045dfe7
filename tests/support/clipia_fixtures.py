"""Clipia and a world around it, for the tests of jobs."""

from collections.abc import AsyncIterator

import pytest_asyncio

from support.clipia import OddClipia, Sandbox, World

# One sandbox for a module: to start and stop it takes longer than most tests.
module = pytest_asyncio.fixture(scope="module", loop_scope="module")
each = pytest_asyncio.fixture(loop_scope="module")


@module
async def served() -> AsyncIterator[Sandbox]:
    """A sandbox that listens."""
    async with Sandbox().listening() as listening:
        yield listening


@each
async def sandbox(served: Sandbox) -> Sandbox:
    """The sandbox in its state after the start."""
    await served.reset()
    return served


@each
async def odd() -> AsyncIterator[OddClipia]:
    """A Clipia with scripted answers."""
    async with OddClipia().listening() as listening:
        yield listening


@each
async def world(database_url: str, sandbox: Sandbox) -> AsyncIterator[World]:
    """A database and the sandbox."""
    async with World(database_url, sandbox.url) as made:
        yield made


@each
async def odd_world(database_url: str, odd: OddClipia) -> AsyncIterator[World]:
    """A database and a Clipia with scripted answers."""
    async with World(database_url, odd.url) as made:
        yield made
