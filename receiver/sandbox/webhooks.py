"""Sends signed webhooks, with up to six attempts and the faults that the switches order."""

import asyncio
import ssl
import time
import uuid
from functools import cached_property
from typing import Any, Final

import httpx
import orjson
import structlog

from receiver.core.signature import sign
from receiver.error_texts import cause
from receiver.sandbox.records import FAILURE, Attempt, Generation
from receiver.sandbox.state import Sandbox

USER_AGENT: Final = "Clipia-Webhooks/1.0 (sandbox)"

log = structlog.get_logger()


class WebhookSender:
    """Sends each generation's webhook in its own task."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, generation: Generation) -> asyncio.Task[None]:
        """Return a task that sends the webhooks of a generation, from its end to the last attempt."""
        task = asyncio.create_task(self._send_all(generation), name=f"webhook of {generation.request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    async def stop(self) -> None:
        """Cancel all tasks."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def send_now(self, generation: Generation, *, conflicting: bool) -> Attempt:
        """Send the webhook of an ended generation once; the switches do not apply."""
        body = orjson.dumps(event(generation, contradicts=conflicting))
        async with self._client() as client:
            return await self._attempt(
                client, generation, body, kind="manual", webhook_id=str(uuid.uuid4()), number=1
            )

    async def _send_all(self, generation: Generation) -> None:
        # The end is checked again after each sleep, because a test may change the clock meanwhile.
        while (wait := generation.ended_at() - self._sandbox.clock()) > 0:  # noqa: ASYNC110 - a clock has no event
            await asyncio.sleep(wait)
        if generation.canceled_at is not None:
            return
        if self._sandbox.hit("webhook_loss_rate"):
            generation.webhook_lost = True
            log.info("webhook lost on purpose", request_id=generation.request_id)
            return
        body = orjson.dumps(event(generation))
        if not await self._deliver(generation, body, kind="result"):
            return
        if self._sandbox.hit("webhook_duplicate_rate"):
            await self._deliver(generation, body, kind="duplicate")
        if self._sandbox.hit("webhook_conflict_rate"):
            await self._deliver(
                generation, orjson.dumps(event(generation, contradicts=True)), kind="conflict"
            )

    async def _deliver(self, generation: Generation, body: bytes, *, kind: str) -> bool:
        """Send until the receiver accepts or no attempt is left; return whether it accepted."""
        webhook_id = str(uuid.uuid4())
        async with self._client() as client:
            for number in range(1, self._sandbox.options.webhook_attempts + 1):
                if number > 1:
                    await asyncio.sleep(self._sandbox.options.webhook_backoff * 2 ** (number - 2))
                attempt = await self._attempt(
                    client, generation, body, kind=kind, webhook_id=webhook_id, number=number
                )
                if attempt.accepted:
                    return True
        return False

    async def _attempt(
        self,
        client: httpx.AsyncClient,
        generation: Generation,
        body: bytes,
        *,
        kind: str,
        webhook_id: str,
        number: int,
    ) -> Attempt:
        at, start = self._sandbox.clock(), time.perf_counter()
        status_code, error = await self._post(client, str(generation.webhook_url), body, webhook_id, int(at))
        attempt = Attempt(
            kind=kind,
            webhook_id=webhook_id,
            number=number,
            at=at,
            seconds=time.perf_counter() - start,
            status_code=status_code,
            error=error,
        )
        generation.attempts.append(attempt)
        log.info(
            "webhook sent",
            request_id=generation.request_id,
            kind=kind,
            attempt=number,
            status_code=status_code,
            error=error,
        )
        return attempt

    async def _post(
        self, client: httpx.AsyncClient, url: str, body: bytes, webhook_id: str, timestamp: int
    ) -> tuple[int | None, str | None]:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": USER_AGENT,
            "X-Clipia-Signature": sign(self._sandbox.secret.encode(), body, timestamp=timestamp),
            "X-Clipia-Timestamp": str(timestamp),
            "X-Clipia-Webhook-Id": webhook_id,
        }
        limit = self._sandbox.options.webhook_timeout
        try:
            # One timeout for the whole exchange: httpx's own timeouts start again with each byte.
            async with (
                asyncio.timeout(limit),
                client.stream("POST", url, content=body, headers=headers) as response,
            ):
                return response.status_code, None
        except TimeoutError:
            return None, f"no answer within {limit:g} s"
        except httpx.HTTPError as error:
            return None, cause(error)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        # Loading the certificates is slow, so it is done once, and only if a webhook is sent.
        return ssl.create_default_context()

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=self._tls, timeout=None, trust_env=False)  # noqa: S113 - `_post` has the limit

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("webhook task failed", task=task.get_name(), exc_info=error)


def event(generation: Generation, *, contradicts: bool = False) -> dict[str, Any]:
    """Return the body of the webhook of an ended generation.

    A body that `contradicts` has ERROR in place of OK, or the reverse.
    """
    if generation.fails is not contradicts:
        return {"request_id": generation.request_id, "status": "ERROR", "error": FAILURE}
    payload = {"model": generation.model, "output": generation.output, "cost": generation.cost}
    return {"request_id": generation.request_id, "status": "OK", "payload": payload}
