"""Webhooks: signed, tried up to six times, and as unreliable as the switches say."""

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
from receiver.sandbox.sandbox import Sandbox

USER_AGENT: Final = "Clipia-Webhooks/1.0 (sandbox)"

log = structlog.get_logger()


class WebhookSender:
    """Sends each generation's webhook in a task of its own; `stop` ends them all."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, generation: Generation) -> asyncio.Task[None]:
        """Send the webhook when the generation has ended; the task is done when nothing is left to send."""
        task = asyncio.create_task(self._accompany(generation), name=f"webhook of {generation.request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    async def stop(self) -> None:
        """Cancel everything that is waiting or being sent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def send_now(self, generation: Generation, *, conflicting: bool) -> Attempt:
        """Send a finished generation's webhook once, whatever the switches say."""
        body = orjson.dumps(contradiction(generation) if conflicting else event(generation))
        async with self._client() as client:
            return await self._try(
                client, generation, body, kind="manual", webhook_id=str(uuid.uuid4()), number=1
            )

    async def _accompany(self, generation: Generation) -> None:
        # A sleep does not follow the clock when that is set, so look again; there is nobody to set an event.
        while (wait := generation.ended_at() - self._sandbox.clock()) > 0:  # noqa: ASYNC110
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
            await self._deliver(generation, orjson.dumps(contradiction(generation)), kind="conflict")

    async def _deliver(self, generation: Generation, body: bytes, *, kind: str) -> bool:
        """Try until the receiver accepts or the tries are used up; say whether it did."""
        webhook_id = str(uuid.uuid4())
        async with self._client() as client:
            for number in range(1, self._sandbox.options.webhook_attempts + 1):
                if number > 1:
                    await asyncio.sleep(self._sandbox.options.webhook_backoff * 2 ** (number - 2))
                attempt = await self._try(
                    client, generation, body, kind=kind, webhook_id=webhook_id, number=number
                )
                if attempt.accepted:
                    return True
        return False

    async def _try(
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
            # Over the whole exchange: httpx's own timeouts start again with every byte.
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
        # Loading the certificates is slow: once, not per webhook, and not where nothing is sent.
        return ssl.create_default_context()

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=self._tls, timeout=None, trust_env=False)  # noqa: S113 - `_post` has the limit

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("webhook task died", task=task.get_name(), exc_info=error)


def event(generation: Generation) -> dict[str, Any]:
    """Return the webhook's content for a generation that has completed or failed."""
    return _error_event(generation) if generation.fails else _ok_event(generation)


def contradiction(generation: Generation) -> dict[str, Any]:
    """Return a webhook's content that says the opposite of `event`."""
    return _ok_event(generation) if generation.fails else _error_event(generation)


def _ok_event(generation: Generation) -> dict[str, Any]:
    payload = {"model": generation.model, "output": generation.output, "cost": generation.cost}
    return {"request_id": generation.request_id, "status": "OK", "payload": payload}


def _error_event(generation: Generation) -> dict[str, Any]:
    return {"request_id": generation.request_id, "status": "ERROR", "error": FAILURE}
