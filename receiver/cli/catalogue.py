"""`receiver models`, `estimate` and `account`: Clipia's models and prices, and the account's credits."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any

import typer

from receiver.cli.client import with_client
from receiver.cli.clipia_calls import Input, Strict, read_input
from receiver.cli.completion import complete_model
from receiver.cli.options import Json
from receiver.cli.submit import reason_text
from receiver.cli.terminal import amount, count, print_json, print_line, print_list, print_result, print_rows
from receiver.client import Client

_FACTS = (
    *("type", "required", "default", "enum", "options", "min", "max", "minimum", "maximum"),
    *("minLength", "maxLength"),
)


def models(
    slug: Annotated[
        str | None,
        typer.Argument(
            help="Show this model: its slug, or the id of a text model.", autocompletion=complete_model
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List Clipia's models with their prices, or show one with its parameters.

    If the price is `estimate`, it depends on the input: see `receiver estimate`. Text models have prices in
    USD per token; they belong to Clipia's chat API, and you cannot submit jobs to them.
    """

    async def run(client: Client) -> Any:
        return await (client.list_models() if slug is None else client.show_model(slug))

    found = with_client(run, prepares=True)
    if slug is None:
        print_list(found, partial(_print_models, found), json=json)
    else:
        print_result(found, partial(_print_model, found), json=json)


def estimate(
    model: Annotated[
        str, typer.Argument(help="The model's slug; see `receiver models`.", autocompletion=complete_model)
    ],
    given: Input,
    strict: Strict = None,
    json: Json = False,
) -> None:
    """Print the price of a job without submitting it."""
    parameters = read_input(given)
    answer = with_client(
        lambda client: client.estimate_price(model, parameters, strict=strict), prepares=True
    )
    if json:
        print_json(answer)
        return
    print_line(f"{answer['credits']} credits")
    for warning in answer.get("warnings") or ():
        print_line(f"warning: {warning.get('message') or warning}")


def account(json: Json = False) -> None:
    """Show the account's credits and limits, and whether Clipia's figures match the receiver's own."""
    found = with_client(lambda client: client.show_account(), prepares=True)
    if json:
        print_json(found)
        return
    limits, own = found["limits"], found["ledger_30d"]
    usage = found.get("usage_30d") or {}
    lines = {
        "account": found.get("account_id") or "unknown",
        "balance": amount((found.get("balance") or {}).get("credits"), "credits"),
        "Clipia, 30 days": f"{amount(usage.get('requests'), 'requests')}, "
        f"{amount(usage.get('credits_spent'), 'credits')} spent",
        "receiver, 30 days": f"{count(own['jobs'], 'job')}, {own['charged']} credits charged, "
        f"{own['reserved']} reserved, {own['refunded']} refunded",
        "limits": f"{limits['requests_per_minute']} requests a minute, "
        f"{limits['in_flight']} generations in flight as far as the receiver knows",
    }
    if found["difference_30d"]:
        lines["difference"] = (
            f"Clipia charged {found['difference_30d']} credits for other requests than the receiver's jobs; "
            "this is normal if other software uses the account"
        )
    if limits["paused"]:
        lines["paused"] = f"Clipia refuses the account ({reason_text(limits['paused'])})"
    if limits["refused_jobs"]:
        lines["refused for now"] = f"{count(limits['refused_jobs'], 'job')}; others are submitted"
    for name, value in lines.items():
        print_line(f"{name + ':':<21}{value}")


def _print_models(found: list[dict[str, Any]]) -> None:
    rows = []
    for model in found:
        slug, type_ = _named(model)
        rows.append({"model": slug, "type": type_, "credits": _price(model), "name": model.get("name")})
    print_rows(rows, "model", "type", "credits", "name", none="No models.")


def _named(model: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a model's slug and its type; text models have an `id` and no `slug`."""
    if slug := model.get("slug"):
        return slug, model.get("type")
    return model.get("id"), model.get("type") or "text"


def _pricing(model: Mapping[str, Any]) -> Mapping[str, Any]:
    pricing = model.get("pricing")
    return pricing if isinstance(pricing, Mapping) else {}


def _price(model: Mapping[str, Any]) -> str:
    """Return a model's price in one word for the list."""
    pricing = _pricing(model)
    if (credits_ := pricing.get("credits")) is not None:
        return str(credits_)
    if "prompt" in pricing or "completion" in pricing:
        return "per token"
    return "estimate" if pricing.get("available") is not False else "unavailable"


def _price_lines(model: Mapping[str, Any]) -> Iterator[str]:
    """Return lines with all facts of the catalogue about a model's price."""
    pricing = _pricing(model)
    yield _price_line(model, pricing)
    multipliers = pricing.get("multipliers")
    for name, factors in multipliers.items() if isinstance(multipliers, Mapping) else ():
        listed = factors.items() if isinstance(factors, Mapping) else ()
        yield f"  {name}: {', '.join(f'{value} costs {factor} times as much' for value, factor in listed)}"
    limits = model.get("text_limits")
    if isinstance(limits, Mapping):
        yield f"text of {limits.get('min_chars')} to {limits.get('max_chars')} characters"


def _price_line(model: Mapping[str, Any], pricing: Mapping[str, Any]) -> str:
    note = pricing.get("note")
    match _price(model):
        case "per token":
            prompt, completion = pricing.get("prompt"), pricing.get("completion")
            return f"{prompt} USD per prompt token, {completion} USD per completion token"
        case "estimate":
            why = f" ({note})" if note else ""
            return f"the price depends on the input{why}: receiver estimate {_named(model)[0]} --input …"
        case "unavailable":
            return "no price is available now"
        case price:
            unit_size = pricing.get("unit_size")
            unit = f" per {unit_size} {pricing.get('billing_unit')}" if unit_size else ""
            return f"{price} credits{unit}{f' {note}' if note else ''}"


def _print_model(model: Mapping[str, Any]) -> None:
    name, kind = _named(model)
    print_line(f"{name}: {model.get('name')} ({kind})")
    for line in _price_lines(model):
        print_line(line)
    for entry in _parameters(model.get("input_schema")):
        facts = ", ".join(f"{name} {entry[name]}" for name in _FACTS if entry.get(name) is not None)
        print_line(f"  {entry.get('name')}: {facts}")
        if entry.get("description"):
            print_line(f"      {entry['description']}")


def _parameters(schema: object) -> list[Mapping[str, Any]]:
    """Return the parameters from either shape of `input_schema`; an empty list if it has another shape."""
    if not isinstance(schema, Mapping):
        return []
    listed = schema.get("parameters")
    if isinstance(listed, list):
        return [entry for entry in listed if isinstance(entry, Mapping)]
    return [{"name": name, **facts} for name, facts in schema.items() if isinstance(facts, Mapping)]
