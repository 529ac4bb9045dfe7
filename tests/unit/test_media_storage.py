"""Work that must run to its end."""

import asyncio
import threading

import pytest

from receiver.media.storage.base import run_to_end


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    """D10: the caller waits for a thread that still writes, even if it is cancelled several times."""
    is_running, may_end = threading.Event(), threading.Event()
    notices: list[bool] = []

    def work() -> None:
        is_running.set()
        may_end.wait(10)

    task = asyncio.create_task(run_to_end(asyncio.to_thread(work), on_cancel=lambda: notices.append(True)))
    assert await asyncio.to_thread(is_running.wait, 10)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert notices == [True] * 3


async def test_a_cancelled_caller_gets_the_cancellation_not_the_error() -> None:
    """D10: if work fails after its caller was cancelled, the caller gets the cancellation."""
    started = asyncio.Event()

    async def work() -> None:
        started.set()
        await asyncio.sleep(0.01)
        raise OSError("late")

    task = asyncio.create_task(run_to_end(work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_results_and_errors_pass_through() -> None:
    """D10: without a cancellation it is an ordinary await."""

    async def work(error: Exception | None) -> int:
        if error is not None:
            raise error
        return 7

    assert await run_to_end(work(None)) == 7
    with pytest.raises(OSError, match="early"):
        await run_to_end(work(OSError("early")))
