"""The sandbox's control API under ``/_sandbox``: its switches and records, and actions by hand."""

import hashlib
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.errors import SettingsError
from receiver.sandbox.answers import Problem, json_response, read_object, timestamp
from receiver.sandbox.records import Attempt, Generation, Submission
from receiver.sandbox.state import Sandbox
from receiver.sandbox.webhooks import WebhookSender


class Control:
    """The endpoints under ``/_sandbox``; they need no key and have no faults."""

    def __init__(self, sandbox: Sandbox, sender: WebhookSender) -> None:
        self._sandbox = sandbox
        self._sender = sender

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/_sandbox/options", self._options, methods=["GET"]),
            Route("/_sandbox/options", self._change, methods=["PATCH"]),
            Route("/_sandbox/requests", self._requests, methods=["GET"]),
            Route("/_sandbox/requests/{id}", self._request, methods=["GET"]),
            Route("/_sandbox/requests/{id}/cancel", self._cancel, methods=["POST"]),
            Route("/_sandbox/requests/{id}/webhook", self._webhook, methods=["POST"]),
            Route("/_sandbox/reset", self._reset, methods=["POST"]),
        ]

    async def _options(self, _request: Request) -> Response:
        return json_response(asdict(self._sandbox.options))

    async def _change(self, request: Request) -> Response:
        try:
            self._sandbox.change(await read_object(request))
        except SettingsError as error:
            raise Problem("invalid_request", f"{error}.") from None
        return json_response(asdict(self._sandbox.options))

    async def _requests(self, _request: Request) -> Response:
        records = self._sandbox.records
        return json_response(
            {
                "requests": [self._shown(generation) for generation in records.generations.values()],
                "submits": [_shown_submission(each) for each in records.submits],
                "idempotency_keys": records.keys(),
            }
        )

    async def _request(self, request: Request) -> Response:
        return json_response(self._shown(self._find(request)))

    async def _cancel(self, request: Request) -> Response:
        generation = self._find(request)
        now = self._sandbox.clock()
        if generation.at(now).terminal:
            raise _invalid_state(f"The request is already {generation.at(now).status}.")
        generation.canceled_at = now
        return json_response(self._shown(generation))

    async def _webhook(self, request: Request) -> Response:
        generation = self._find(request)
        conflicting = await _read_conflicting(request)
        status = generation.at(self._sandbox.clock()).status
        if generation.webhook_url is None:
            raise _invalid_state("The request was submitted without a webhook_url.")
        if status not in ("COMPLETED", "FAILED"):
            raise _invalid_state(f"The request is {status}; only COMPLETED and FAILED have a webhook.")
        return json_response(_shown_attempt(await self._sender.send_now(generation, conflicting=conflicting)))

    async def _reset(self, _request: Request) -> Response:
        await self._sender.stop()
        self._sandbox.reset()
        return Response(status_code=204)

    def _find(self, request: Request) -> Generation:
        return self._sandbox.records.find(request.path_params["id"])

    def _shown(self, generation: Generation) -> dict[str, Any]:
        progress = generation.at(self._sandbox.clock())
        return {
            "request_id": generation.request_id,
            "mode": "live" if generation.live else "test",
            "model": generation.model,
            "status": progress.status,
            "progress": progress.progress,
            "cost": generation.cost,
            "created_at": _moment(generation.created_at),
            "ended_at": _moment(generation.ended_at()) if progress.terminal else None,
            "idempotency_key": generation.idempotency_key,
            "submits": generation.submits,
            "body": generation.body.decode(errors="replace"),
            "webhook": self._shown_webhook(generation),
        }

    def _shown_webhook(self, generation: Generation) -> dict[str, Any] | None:
        if generation.webhook_url is None:
            return None
        attempts = [_shown_attempt(attempt) for attempt in generation.attempts]
        return {"url": generation.webhook_url, "lost": generation.webhook_lost, "attempts": attempts}


def _moment(at: float) -> str:
    return timestamp(at, timespec="milliseconds")


async def _read_conflicting(request: Request) -> bool:
    """Return the field `conflicting` of the optional body."""
    content = await read_object(request) if await request.body() else {}
    conflicting = content.pop("conflicting", False)
    if content or not isinstance(conflicting, bool):
        raise Problem("invalid_request", 'The body may only have "conflicting", which must be true or false.')
    return conflicting


def _invalid_state(message: str) -> Problem:
    return Problem("invalid_state", message, status=HTTPStatus.CONFLICT)


def _shown_submission(submission: Submission) -> dict[str, Any]:
    return asdict(submission) | {
        "at": _moment(submission.at),
        "body": submission.body.decode(errors="replace"),
        "body_sha256": hashlib.sha256(submission.body).hexdigest(),
    }


def _shown_attempt(attempt: Attempt) -> dict[str, Any]:
    return asdict(attempt) | {"at": _moment(attempt.at), "seconds": round(attempt.seconds, 3)}
