"""`receiver models`, `estimate` and `account`: what Clipia offers, at which price, and what is left."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from receiver.cli.submitting import Input, read_input, with_submitter
from receiver.cli.terminal import Json, print_json, print_line, wide
from receiver.submitter import Submitter

_FACTS = ("type", "required", "default", "enum", "options", "min", "max", "minimum", "maximum")


def models(
    slug: Annotated[str | None, typer.Argument(help="One model, with its parameters.")] = None,
    json: Json = False,
) -> None:
    """List Clipia's models with their prices, or show one with its parameters."""

    async def run(submitter: Submitter) -> Any:
        catalogue = submitter.catalogue
        return await catalogue.models() if slug is None else await catalogue.model(slug, fresh=0.0)

    found = with_submitter(run)
    if json:
        print_json(found)
    elif slug is None:
        _print_models(found)
    else:
        _print_model(found)


def estimate(
    model: Annotated[str, typer.Argument(help="The model's slug.")], given: Input, json: Json = False
) -> None:
    """Tell what a job would cost; nothing is queued."""
    parameters = read_input(given)

    async def run(submitter: Submitter) -> dict[str, Any]:
        await submitter.catalogue.check(model, parameters)
        return await submitter.catalogue.estimate(model, parameters)

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
        "account": found.get("account_id"),
        "balance": f"{(found.get('balance') or {}).get('credits')} credits",
        "Clipia, 30 days": f"{usage.get('requests')} requests, {usage.get('credits_spent')} credits spent",
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
        lines["paused"] = f"Clipia refuses submissions: {limits['paused'].get('message')}"
    for name, value in lines.items():
        print_line(f"{name + ':':<21}{value}")


def _print_models(found: list[dict[str, Any]]) -> None:
    table = Table(box=None)
    for name in ("slug", "type", "credits", "name"):
        table.add_column(name, no_wrap=True)
    for model in found:
        # Text models have no slug: they are not submitted to.
        if slug := model.get("slug"):
            credits_ = (model.get("pricing") or {}).get("credits", "-")
            table.add_row(
                Text(str(slug)), *(Text(str(v)) for v in (model.get("type"), credits_, model.get("name")))
            )
    wide.print(table)


def _print_model(model: Mapping[str, Any]) -> None:
    pricing = model.get("pricing") or {}
    print_line(f"{model.get('slug')}: {model.get('name')} ({model.get('type')})")
    print_line(f"{pricing.get('credits')} credits{' ' + pricing['note'] if pricing.get('note') else ''}")
    schema = model.get("input_schema")
    listed = schema.get("parameters") if isinstance(schema, Mapping) else None
    entries = (
        listed
        if isinstance(listed, list)
        else [{"name": name, **facts} for name, facts in (schema or {}).items() if isinstance(facts, Mapping)]
    )
    for entry in entries:
        facts = ", ".join(f"{name} {entry[name]}" for name in _FACTS if entry.get(name) is not None)
        print_line(f"  {entry.get('name')}: {facts}")
        if entry.get("description"):
            print_line(f"      {entry['description']}")
