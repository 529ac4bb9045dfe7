"""Submission, status and result: ``POST /v1/models/{slug}`` and ``GET /v1/requests/{id}[/status]``."""

import asyncio
import hashlib
import uuid
from functools import partial
from typing import Any, Final

import httpx
import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response

from receiver.sandbox.answers import Problem, json_response, read_input, read_object, retry_after, timestamp
from receiver.sandbox.catalogue import FileUrl, Model, find_model
from receiver.sandbox.gate import Gate
from receiver.sandbox.records import FAILURE, Generation, Submission
from receiver.sandbox.state import Sandbox
from receiver.sandbox.webhooks import WebhookSender

LONGEST_KEY: Final = 255
LONGEST_URL: Final = 2048

log = structlog.get_logger()


class Generations:
    """The endpoints that start generations and return their state and result."""

    def __init__(self, sandbox: Sandbox, gate: Gate, sender: WebhookSender) -> None:
        self._sandbox = sandbox
        self._gate = gate
        self._sender = sender

    async def submit(self, request: Request) -> Response:
        """Check and carry out a submission; it is recorded even if it is refused."""
        submission = Submission(
            at=self._sandbox.clock(),
            model=request.path_params["slug"],
            idempotency_key=request.headers.get("Idempotency-Key"),
            body=await request.body(),
        )
        self._sandbox.records.submits.append(submission)
        response = await self._gate.answer(request, partial(self._accept, submission))
        submission.status = response.status_code
        return response

    async def status(self, request: Request, api_key: str) -> Response:
        """Answer with the state and the progress."""
        generation = self._find(request, api_key)
        progress = generation.at(self._sandbox.clock())
        return json_response(
            {
                "request_id": generation.request_id,
                "status": progress.status,
                "queue_position": progress.queue_position,
                "progress": progress.progress,
                "logs": [],
            }
        )

    async def result(self, request: Request, api_key: str) -> Response:
        """Answer with the result, or with 202 before the generation has ended."""
        generation = self._find(request, api_key)
        progress = generation.at(self._sandbox.clock())
        result: dict[str, Any] = {
            "request_id": generation.request_id,
            "status": progress.status,
            "model": generation.model,
            "cost": generation.cost,
            "created_at": timestamp(generation.created_at),
        }
        if not progress.terminal:
            return json_response(result, status=202)
        result["output"] = generation.output if progress.status == "COMPLETED" else None
        result["cost"] = generation.cost if progress.status == "COMPLETED" else 0
        result["completed_at"] = timestamp(generation.ended_at())
        if progress.status == "FAILED":
            result["error"] = FAILURE
        return json_response(result)

    async def _accept(self, submission: Submission, request: Request, api_key: str) -> Response:
        options = self._sandbox.options
        if options.refuse_submits:
            raise self._gate.ordered_error(options.refuse_submits, "refuse_submits")
        key = submission.idempotency_key
        if key is not None and not 0 < len(key) <= LONGEST_KEY:
            raise Problem("invalid_request", f"Idempotency-Key must have from 1 to {LONGEST_KEY} characters.")
        content = await read_object(request)
        fingerprint = _fingerprint(submission.model, content)
        with self._sandbox.records.use_key(api_key, key, fingerprint, self._sandbox.clock()) as use:
            if use.generation is None:
                use.generation = self._generate(
                    submission, content, api_key, str(request.base_url).rstrip("/")
                )
                await self._send_webhook(use.generation)
            use.generation.submits += 1
            submission.request_id = use.generation.request_id
            # The key is in use during the delay, so that a second call gets `request_in_progress`.
            await asyncio.sleep(options.latency)
        if self._sandbox.hit("lost_answer_rate"):
            raise Problem("service_unavailable", "Ordered by the switch lost_answer_rate.", status=504)
        return json_response(_submitted(use.generation))

    def _generate(
        self, submission: Submission, content: dict[str, Any], api_key: str, origin: str
    ) -> Generation:
        options, now = self._sandbox.options, self._sandbox.clock()
        model = find_model(submission.model)
        given = read_input(content)
        model.check(given)
        webhook_url = _webhook_url(content)
        cost = model.price(given)
        live = api_key.startswith("clipia_live_")
        if live:
            self._check_account(api_key, cost, now)
        request_id = str(uuid.uuid4())
        file_url = self._file_url(model, origin, request_id=request_id if live else None)
        generation = Generation(
            request_id=request_id,
            api_key=api_key,
            live=live,
            model=model.slug,
            cost=cost,
            output=model.output(given, file_url, live=live),
            warnings=model.warnings(given),
            fails=self._sandbox.hit("fail_rate"),
            origin=origin,
            webhook_url=webhook_url,
            idempotency_key=submission.idempotency_key,
            body=submission.body,
            created_at=now,
            duration=options.duration if live and not options.webhook_first else 0.0,
        )
        self._sandbox.records.add(generation)
        log.info("generation submitted", request_id=request_id, model=model.slug, live=live, cost=cost)
        return generation

    def _check_account(self, api_key: str, cost: int, now: float) -> None:
        """Raise `Problem` if a live generation would exceed the account's credits or concurrency limit."""
        options, account = self._sandbox.options, self._sandbox.records.account(api_key)
        balance = options.credits - account.spent(now)
        if cost > balance:
            raise Problem("insufficient_credits", f"The generation costs {cost} credits; {balance} are left.")
        running = account.running(now)
        if len(running) >= options.concurrency_limit:
            wait = min(generation.ended_at() for generation in running) - now
            raise Problem(
                "concurrency_limit_exceeded",
                f"{len(running)} generations are already in flight.",
                headers=retry_after(wait, now=now, as_date=options.retry_after_date),
            )

    async def _send_webhook(self, generation: Generation) -> None:
        if generation.webhook_url is None:
            return
        sending = self._sender.start(generation)
        if self._sandbox.options.webhook_first:
            await asyncio.wait({sending}, timeout=self._sandbox.options.webhook_timeout)

    def _file_url(self, model: Model, origin: str, *, request_id: str | None) -> FileUrl:
        """Return a function that makes file URLs: fixed ones for test keys, which have no `request_id`."""
        video_bytes = self._sandbox.options.video_bytes

        def file_url(number: int, extension: str) -> str:
            if extension == "mp4" and video_bytes:
                return f"{origin}/works/blob/{video_bytes}.mp4"
            if request_id is not None:
                return f"{origin}/works/{request_id}-{number}.{extension}"
            suffix = "" if number == 1 else f"-{number}"
            return f"{origin}/sandbox/sample-{model.type}{suffix}.{extension}"

        return file_url

    def _find(self, request: Request, api_key: str) -> Generation:
        generation = self._sandbox.records.find(request.path_params["id"])
        if generation.api_key != api_key:
            raise Problem("not_found", f'There is no request "{generation.request_id}".')
        return generation


def _submitted(generation: Generation) -> dict[str, Any]:
    url = f"{generation.origin}/v1/requests/{generation.request_id}"
    return {
        "request_id": generation.request_id,
        # The same in each answer with this idempotency key, as if the first answer was stored.
        "status": "IN_QUEUE" if generation.live else generation.at(generation.created_at).status,
        "queue_position": 0,
        "status_url": f"{url}/status",
        "response_url": url,
        "cost": generation.cost,
        "warnings": generation.warnings,
    }


def _fingerprint(model: str, content: dict[str, Any]) -> bytes:
    try:
        canonical = orjson.dumps([model, content], option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        # orjson reads deeper nesting than it writes.
        raise Problem("invalid_request", "The body is nested too deeply.") from None
    return hashlib.sha256(canonical).digest()


def _webhook_url(content: dict[str, Any]) -> str | None:
    url = content.get("webhook_url")
    if url is None:
        return None
    if not isinstance(url, str) or len(url) > LONGEST_URL or not _may_be_called(url):
        message = "webhook_url must be an https URL; http is accepted for localhost and 127.0.0.1 only."
        raise Problem("webhook_url_invalid", message)
    return url


def _may_be_called(url: str) -> bool:
    # httpx parses it, because httpx will connect: another parser may find another host.
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    local = parsed.scheme == "http" and parsed.host in ("localhost", "127.0.0.1")
    return bool(parsed.host) and (local or parsed.scheme == "https")
