"""What a tool is: a row that is listed to agents, and the function behind it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from receiver.client import Client
from receiver.setting_fields import Scope

Report = Callable[[float, str], Awaitable[None]]
"""Tells the agent the progress of its call: percent, and a short text."""


class Arguments(Protocol):
    """A model of a tool's arguments."""

    @classmethod
    def read(cls, values: object) -> Any:
        """Validate the arguments. Raises RequestError, which names the wrong one."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        """Return the schema that agents see."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """The receiver that the tools of one agent work with."""

    client: Client
    internal_url: str | None
    """The base of links to stored files; None if it is not known."""
    report: Report
    is_stopping: Callable[[], bool]
    """Whether the process is about to end: a call that waits has to answer now."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A row of the table of tools."""

    name: str
    title: str
    description: str
    """For a model: what it does, when to use it, units, and what it costs."""
    scope: Scope
    """An agent without it does not see the tool."""
    arguments: type[Arguments]
    answer: Any
    """The type of the result."""
    run: Callable[[Session, Any], Awaitable[object]]
    acts: bool = False
    """Whether it needs `--allow-write`: it changes something for other callers or consumers."""
    read_only: bool = True
    destructive: bool = False
    """Whether it may cost twice, or end or stop something."""
    idempotent: bool = True
    """Whether a repetition with the same arguments has no further effect."""
    open_world: bool = False
    """Whether it may ask Clipia."""
