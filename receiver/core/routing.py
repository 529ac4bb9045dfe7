"""Decides whether an event matches a destination's filter; pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from receiver.destination_settings import FilterSettings


@dataclass(frozen=True, kw_only=True)
class RoutingFacts:
    """The values of an event that filters compare."""

    status: str
    """`OK` or `ERROR`."""
    model: str | None
    source: str
    caller: str | None
    """The submitter of the job; None if the event does not belong to a job of this service."""
    metadata: Mapping[str, str]


def mismatch(filter_: FilterSettings, facts: RoutingFacts) -> str | None:
    """Return the reason why an event does not match a filter, None if it does."""
    exact = {"status": facts.status, "source": facts.source, "caller": facts.caller}
    for name, value in exact.items():
        allowed = getattr(filter_, name)
        if allowed and value not in allowed:
            return _reason(name, value, allowed)
    if filter_.model and not any(fnmatchcase(facts.model or "", pattern) for pattern in filter_.model):
        return _reason("model", facts.model, filter_.model)
    for key, allowed in filter_.metadata.items():
        if facts.metadata.get(key) not in allowed:
            return _reason(f"metadata.{key}", facts.metadata.get(key), allowed)
    return None


def filter_text(filter_: FilterSettings) -> str:
    """Return a filter as text: `status OK, model seedance-* or nano-*`; empty if all events match."""
    lines = {name: getattr(filter_, name) for name in ("status", "model", "source", "caller")}
    lines |= {f"metadata.{key}": allowed for key, allowed in filter_.metadata.items()}
    return ", ".join(f"{name} {' or '.join(allowed)}" for name, allowed in lines.items() if allowed)


def _reason(name: str, value: str | None, allowed: tuple[str, ...]) -> str:
    shown = "absent" if value is None else repr(value)
    return f"{name} is {shown}, the filter allows {' or '.join(map(repr, allowed))}"
