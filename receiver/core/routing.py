"""Which events go to which destination; pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from receiver.destination_settings import FilterSettings


@dataclass(frozen=True, kw_only=True)
class RoutingFacts:
    """What a filter looks at."""

    status: str
    """`OK` or `ERROR`."""
    model: str | None
    source: str
    caller: str | None
    """Who submitted the job; None for an event whose job is not ours."""
    metadata: Mapping[str, str]


def mismatch(wanted: FilterSettings, facts: RoutingFacts) -> str | None:
    """Return why an event is not for a destination with this filter, None where it is."""
    exact = {"status": facts.status, "source": facts.source, "caller": facts.caller}
    for name, value in exact.items():
        allowed = getattr(wanted, name)
        if allowed and value not in allowed:
            return _because(name, value, allowed)
    if wanted.model and not any(fnmatchcase(facts.model or "", pattern) for pattern in wanted.model):
        return _because("model", facts.model, wanted.model)
    for key, allowed in wanted.metadata.items():
        if facts.metadata.get(key) not in allowed:
            return _because(f"metadata.{key}", facts.metadata.get(key), allowed)
    return None


def filter_text(wanted: FilterSettings) -> str:
    """Return a filter in words, such as `status OK, model seedance-* or nano-*`; empty for all events."""
    lines = {"status": wanted.status, "model": wanted.model, "source": wanted.source, "caller": wanted.caller}
    lines |= {f"metadata.{key}": allowed for key, allowed in wanted.metadata.items()}
    return ", ".join(f"{name} {' or '.join(allowed)}" for name, allowed in lines.items() if allowed)


def _because(name: str, value: str | None, allowed: tuple[str, ...]) -> str:
    shown = "absent" if value is None else repr(value)
    return f"{name} is {shown}, wanted is {' or '.join(map(repr, allowed))}"
