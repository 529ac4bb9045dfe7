"""The tools that answer questions of operators; they change nothing."""

from typing import Annotated, Final

from pydantic import Field

from receiver.api.parameters import Moment, Parameters, one_of
from receiver.client import Page
from receiver.core.diagnosis import Cause
from receiver.db.rejections import ListedRejection
from receiver.db.views import ListedDelivery, ReplayCounts
from receiver.explain import Explanation
from receiver.mcp.generation import NoArguments
from receiver.mcp.tool import Session, Tool
from receiver.replays import ReplayRequest
from receiver.status import Status

Rows = Annotated[int, Field(ge=1, le=50)]
Text = Annotated[str, Field(min_length=1, max_length=2048)]


class WhyArguments(Parameters):
    """An object to explain."""

    id: Text
    """The id of an event, a job (generation) or a delivery, Clipia's request_id, a job's idempotency key, or
    a file's URL."""


class RejectionsArguments(Parameters):
    """Which rejected requests to list."""

    limit: Rows = 20
    cursor: Text | None = None
    """The `next` of the page before."""
    cause: Annotated[Cause | None, one_of(Cause)] = None
    since: Moment | None = None
    """At or after this time, or an age such as 2h."""
    until: Moment | None = None
    """Before this time."""


class DeadLettersArguments(Parameters):
    """Which dead letters to list."""

    limit: Rows = 20
    cursor: Text | None = None
    """The `next` of the page before."""
    destination: Text | None = None
    since: Moment | None = None
    """Made at or after this time, or an age such as 2h."""
    until: Moment | None = None
    """Made before this time."""


async def _status(session: Session, _given: NoArguments) -> Status:
    return await session.client.show_status()


async def _why(session: Session, given: WhyArguments) -> Explanation:
    return await session.client.explain_object(given.id)


async def _list_rejections(session: Session, given: RejectionsArguments) -> Page[ListedRejection]:
    return await session.client.list_rejections(**given.model_dump())


async def _list_dead_letters(session: Session, given: DeadLettersArguments) -> Page[ListedDelivery]:
    return await session.client.list_deliveries(state="dead", **given.model_dump())


async def _replay_dry_run(session: Session, given: ReplayRequest) -> ReplayCounts:
    return await session.client.count_replay(given)


ON_CALL_TOOLS: Final = (
    Tool(
        name="status",
        title="Show the service's status",
        description=(
            "Show lanes, destinations, workers, jobs of the last 24 hours and disks, and in `problems` "
            "what is wrong, the most urgent first, each with the command that shows more. Call it first "
            "when something seems broken."
        ),
        scope="read",
        arguments=NoArguments,
        answer=Status,
        run=_status,
    ),
    Tool(
        name="why",
        title="Explain the state of one object",
        description=(
            "Explain in one sentence (`verdict`) why an event, a job, a delivery or a file is in its "
            "state, with the facts in order of time and the next commands. `outcome` is delivered, waiting "
            "(it comes by itself), needs_action (a person has to act), ended (without being delivered "
            "everywhere) or unknown."
        ),
        scope="operate",
        arguments=WhyArguments,
        answer=Explanation,
        run=_why,
    ),
    Tool(
        name="list_rejections",
        title="List rejected webhooks",
        description=(
            "List requests to the callback that were rejected, newest first, each with its diagnosis. Call "
            "it if webhooks do not arrive: a wrong secret, a proxy that changes the body, a clock that is "
            "off."
        ),
        scope="operate",
        arguments=RejectionsArguments,
        answer=Page[ListedRejection],
        run=_list_rejections,
    ),
    Tool(
        name="list_dead_letters",
        title="List dead letters",
        description=(
            "List deliveries that were given up (dead letters), newest first, each with the error of its "
            "last attempt. They stay until an operator retries or discards them."
        ),
        scope="operate",
        arguments=DeadLettersArguments,
        answer=Page[ListedDelivery],
        run=_list_dead_letters,
    ),
    Tool(
        name="replay_dry_run",
        title="Count a replay",
        description=(
            "Count the events that a replay would send again, and the deliveries by destination; nothing is "
            "sent. Select events with `selection` (ids or request_ids, since, until, status, model, source, "
            "caller, destination, delivery_state), or set `all`. Call it before every replay."
        ),
        scope="operate",
        arguments=ReplayRequest,
        answer=ReplayCounts,
        run=_replay_dry_run,
    ),
)
