"""The tools that act for an operator. They exist only with `--allow-write`; each call goes on record."""

from typing import Annotated, Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from receiver.api.models import RestartedMany
from receiver.api.parameters import Flag, Id, Ids, Moment, Parameters
from receiver.core.request_values import MAX_KEY_LENGTH
from receiver.db.views import ReplayDetails
from receiver.destination_control import ListedDestination
from receiver.mcp.generation import Generation, GenerationArguments, generation_of
from receiver.mcp.on_call import Text
from receiver.mcp.tool import Session, Tool
from receiver.replays import ReplayRequest

Reason = Annotated[str, Field(min_length=1, max_length=1000)]
"""An agent has to give one: the record of an action must tell why a program did it."""


class RetryArguments(Parameters):
    """The dead letters to deliver again: those that match all given filters."""

    reason: Reason
    """Why; it goes on record."""
    ids: Ids = Field(default_factory=list, max_length=1000)
    """Ids of deliveries."""
    destination: Text | None = None
    since: Moment | None = None
    """Given up at or after this time, or an age such as 2h."""
    until: Moment | None = None
    """Given up before this time."""
    all: Flag = False
    """All dead letters; required without a filter."""
    not_restarted_since: Moment | None = None
    """To go on if `more` was true: the `began` of the first result."""


class ReplayArguments(ReplayRequest):
    """The events to send again."""

    reason: Reason
    """Why; it goes on record."""
    idempotency_key: Annotated[str, Field(min_length=1, max_length=MAX_KEY_LENGTH)]
    """Your name for this replay: the same key is the same replay."""


class DiscardArguments(Parameters):
    """A delivery to end."""

    id: Id
    """The id of a pending or dead delivery."""
    reason: Reason
    """Why; it goes on record."""


class Discarded(BaseModel):
    """A delivery that has ended for good."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    discarded: UUID
    """The id of the delivery."""


class DestinationArguments(Parameters):
    """A destination."""

    name: Text
    """The destination's name, from status."""
    reason: Reason
    """Why; it goes on record."""


class ResubmitArguments(GenerationArguments):
    """A generation to submit again."""

    reason: Reason
    """Why it is certain that Clipia does not have it; it goes on record."""


async def _retry(session: Session, given: RetryArguments) -> RestartedMany:
    return await session.client.retry_dead_letters(**given.model_dump())


async def _replay(session: Session, given: ReplayArguments) -> ReplayDetails:
    order = ReplayRequest.read(given.model_dump(exclude={"idempotency_key"}, exclude_unset=True))
    return await session.client.order_replay(order, key=given.idempotency_key)


async def _discard(session: Session, given: DiscardArguments) -> Discarded:
    await session.client.discard_delivery(given.id, reason=given.reason)
    return Discarded(discarded=given.id)


async def _pause(session: Session, given: DestinationArguments) -> ListedDestination:
    return await session.client.pause_destination(given.name, reason=given.reason)


async def _resume(session: Session, given: DestinationArguments) -> ListedDestination:
    return await session.client.resume_destination(given.name, reason=given.reason)


async def _resubmit(session: Session, given: ResubmitArguments) -> Generation:
    return generation_of(await session.client.resubmit_job(given.id, reason=given.reason), session)


ACTION_TOOLS: Final = (
    Tool(
        name="retry_dead_letters",
        title="Deliver dead letters again",
        description=(
            "Deliver dead letters again, up to 10,000 in a call, after their cause is repaired; consumers "
            "get the events with the same ids. If `more` is true, call it again with `began` as "
            "not_restarted_since."
        ),
        scope="operate",
        arguments=RetryArguments,
        answer=RestartedMany,
        run=_retry,
        acts=True,
        read_only=False,
        idempotent=False,
    ),
    Tool(
        name="replay_events",
        title="Send events again",
        description=(
            "Send stored events again, with the same event ids and new delivery ids: consumers get them "
            "once more. Call replay_dry_run with the same selection first. Workers carry it out. Nothing "
            "is generated and no credits are spent."
        ),
        scope="operate",
        arguments=ReplayArguments,
        answer=ReplayDetails,
        run=_replay,
        acts=True,
        read_only=False,
    ),
    Tool(
        name="discard_delivery",
        title="Discard a delivery",
        description=(
            "End one pending or dead delivery for good: its destination does not get this event unless it is "
            "replayed. Only if an operator has asked for it."
        ),
        scope="operate",
        arguments=DiscardArguments,
        answer=Discarded,
        run=_discard,
        acts=True,
        read_only=False,
        destructive=True,
    ),
    Tool(
        name="pause_destination",
        title="Pause a destination",
        description=(
            "Stop deliveries to a destination in all processes; its events wait and nothing is lost. It "
            "lasts until resume_destination."
        ),
        scope="operate",
        arguments=DestinationArguments,
        answer=ListedDestination,
        run=_pause,
        acts=True,
        read_only=False,
        destructive=True,
    ),
    Tool(
        name="resume_destination",
        title="Resume a destination",
        description="End the pause of a destination; the events that wait are delivered.",
        scope="operate",
        arguments=DestinationArguments,
        answer=ListedDestination,
        run=_resume,
        acts=True,
        read_only=False,
    ),
    Tool(
        name="resubmit_generation",
        title="Submit a generation again",
        description=(
            "Submit an unsure, failed or canceled generation again, under a new key at Clipia. WARNING: if "
            "Clipia has the first one after all, it is paid for TWICE. Only if an operator has made sure "
            "in Clipia's console that it does not exist there."
        ),
        scope="operate",
        arguments=ResubmitArguments,
        answer=Generation,
        run=_resubmit,
        acts=True,
        read_only=False,
        destructive=True,
        idempotent=False,
        open_world=True,
    ),
)
