"""`receiver models`, `estimate` and `account`: what Clipia offers, at which price, and what is left."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from receiver.cli.submit import describe_error
from receiver.cli.submitting import Input, Strict, read_input, with_submitter
from receiver.cli.terminal import Json, amount, print_json, print_line, wide
from receiver.clipia.client import Estimate
from receiver.submitter import Submitter

_FACTS = (
    *("type", "required", "default", "enum", "options", "min", "max", "minimum", "maximum"),
    *("minLength", "maxLength"),
)


def models(
    slug: Annotated[str | None, typer.Argument(help="One model: its slug, or a text model's id.")] = None,
    json: Json = False,
) -> None:
    """List Clipia's models with their prices, or show one with its parameters.

    `estimate` in place of a price: it depends on the input, and `receiver estimate` tells it. Text models
    have prices in USD per token; they belong to Clipia's chat API, and no job can be submitted to them.
    """

    async def run(submitter: Submitter) -> Any:
        catalogue = submitter.catalogue
        return await catalogue.models() if slug is None else await catalogue.model(slug, max_age=0.0)

    found = with_submitter(run)
    if json:
        print_json(found)
    elif slug is None:
        _print_models(found)
    else:
        _print_model(found)


def estimate(
    model: Annotated[str, typer.Argument(help="The model's slug.")],
    given: Input,
    strict: Strict = None,
    json: Json = False,
) -> None:
    """Tell what a job would cost; nothing is queued."""
    parameters = read_input(given)

    async def run(submitter: Submitter) -> Estimate:
        return await submitter.catalogue.estimate_checked(model, parameters, strict=strict)

    answer = with_submitter(run)
    if json:
        print_json(answer)
        return
    print_line(f"{answer['credits']} credits")
    for warning in answer.get("warnings") or ():
        print_line(f"warning: {warning.get('message') or warning}")


def account(json: Json = False) -> None:
    """Show the account's credits and limits, and whether Clipia's figures agree with our own ledger."""
    found = with_submitter(lambda submitter: submitter.account())
    if json:
        print_json(found)
        return
    limits, ledger = found["limits"], found["ledger_30d"]
    usage = found.get("usage_30d") or {}
    lines = {
        "account": found.get("account_id") or "unknown",
        "balance": amount((found.get("balance") or {}).get("credits"), "credits"),
        "Clipia, 30 days": f"{amount(usage.get('requests'), 'requests')}, "
        f"{amount(usage.get('credits_spent'), 'credits')} spent",
        "our ledger, 30 days": f"{ledger['jobs']} jobs, {ledger['charged']} credits charged, "
        f"{ledger['reserved']} reserved, {ledger['refunded']} refunded",
        "limits": f"{limits['requests_per_minute']} requests a minute, "
        f"{limits['in_flight']} generations in flight as far as they were tried",
    }
    if found["difference_30d"]:
        lines["difference"] = (
            f"{found['difference_30d']} credits that Clipia charged and we know nothing of; "
            "normal where others use the account"
        )
    if limits["paused"]:
        lines["paused"] = f"Clipia refuses the account ({describe_error(limits['paused'])})"
    if limits["refused_jobs"]:
        lines["refused for now"] = f"{limits['refused_jobs']} jobs; others are submitted"
    for name, value in lines.items():
        print_line(f"{name + ':':<21}{value}")


def _print_models(found: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for name in ("model", "type", "credits", "name"):
        table.add_column(name, no_wrap=True)
    for model in found:
        name, kind = _named(model)
        facts = (name, kind, _price(model), model.get("name"))
        table.add_row(*(Text("-" if each is None else str(each)) for each in facts))
    wide.print(table)


def _named(model: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return what a model is called by, and its type; text models have an `id` and no `slug`."""
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
    """Write all that the catalogue says of a model's price."""
    pricing = _pricing(model)
    match _price(model):
        case "per token":
            prompt, completion = pricing.get("prompt"), pricing.get("completion")
            yield f"{prompt} USD per prompt token, {completion} USD per completion token"
        case "estimate":
            note = f" ({pricing['note']})" if pricing.get("note") else ""
            yield f"the price depends on the input{note}: receiver estimate {_named(model)[0]} --input …"
        case "unavailable":
            yield "no price is available now"
        case credits_:
            size = pricing.get("unit_size")
            unit = f" per {size} {pricing.get('billing_unit')}" if size else ""
            yield f"{credits_} credits{unit}{' ' + pricing['note'] if pricing.get('note') else ''}"
    multipliers = pricing.get("multipliers")
    for name, factors in multipliers.items() if isinstance(multipliers, Mapping) else ():
        listed = factors.items() if isinstance(factors, Mapping) else ()
        yield f"  {name}: {', '.join(f'{value} costs {factor} times as much' for value, factor in listed)}"
    limits = model.get("text_limits")
    if isinstance(limits, Mapping):
        yield f"text of {limits.get('min_chars')} to {limits.get('max_chars')} characters"


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
    """Return the parameters from either shape of `input_schema`; none if it is neither."""
    if not isinstance(schema, Mapping):
        return []
    listed = schema.get("parameters")
    if isinstance(listed, list):
        return [entry for entry in listed if isinstance(entry, Mapping)]
    return [{"name": name, **facts} for name, facts in schema.items() if isinstance(facts, Mapping)]
