"""The routes of Clipia's documented API v1; the endpoints of the catalogue and the account."""

import uuid

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.sandbox.answers import Problem, json_response, read_input, read_object
from receiver.sandbox.catalogue import find_model, listing, model_details
from receiver.sandbox.gate import Gate
from receiver.sandbox.generations import Generations
from receiver.sandbox.state import Sandbox
from receiver.sandbox.webhooks import WebhookSender


def routes(sandbox: Sandbox, sender: WebhookSender) -> list[BaseRoute]:
    """Return the routes under ``/v1``; an undocumented path or method is answered 404."""
    gate = Gate(sandbox)
    generations = Generations(sandbox, gate, sender)

    async def account(_request: Request, api_key: str) -> Response:
        now = sandbox.clock()
        holder = sandbox.records.account(api_key)
        return json_response(
            {
                "account_id": str(uuid.uuid5(uuid.NAMESPACE_OID, api_key)),
                "balance": {"credits": max(0, sandbox.options.credits - holder.spent(now))},
                "usage_30d": holder.usage(now),
            }
        )

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    return [
        Route("/v1/models", gate.guard(_models), methods=["GET"]),
        # `path` also accepts a slug with a slash, so that the error is `model_not_found`.
        Route("/v1/models/{slug:path}/estimate", gate.guard(_estimate), methods=["POST"]),
        Route("/v1/models/{slug:path}", gate.guard(_model), methods=["GET"]),
        Route("/v1/models/{slug:path}", generations.submit, methods=["POST"]),
        Route("/v1/requests/{id}/status", gate.guard(generations.status), methods=["GET"]),
        Route("/v1/requests/{id}", gate.guard(generations.result), methods=["GET"]),
        Route("/v1/account", gate.guard(account), methods=["GET"]),
        Route("/v1/{path:path}", gate.guard(_no_route), methods=methods),
    ]


async def _models(_request: Request, _api_key: str) -> Response:
    return json_response({"object": "list", "data": listing()})


async def _model(request: Request, _api_key: str) -> Response:
    return json_response(model_details(request.path_params["slug"]))


async def _estimate(request: Request, _api_key: str) -> Response:
    model = find_model(request.path_params["slug"])
    given = read_input(await read_object(request))
    model.check(given)
    return json_response({"credits": model.price(given), "warnings": model.warnings(given)})


async def _no_route(request: Request, _api_key: str) -> Response:
    raise Problem("not_found", f"There is no {request.method} {request.url.path}.")
