"""The tools that submit and read jobs and read Clipia's models; their names are those of Clipia's server."""

import asyncio
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from receiver.api.parameters import Parameters
from receiver.core.file_links import file_link
from receiver.core.request_values import MAX_KEY_LENGTH
from receiver.db.rows import JobState
from receiver.errors import RequestError
from receiver.mcp.tool import Session, Tool
from receiver.price import MAX_CREDITS, Credits
from receiver.submitter.account_status import Account
from receiver.submitter.job import Job, JobFile

MAX_FILES: Final = 50
"""Files of one generation in a result."""
MAX_MODELS: Final = 500
MAX_WAIT_SECONDS: Final = 300.0
REPORT_SECONDS: Final = 5.0
"""Time between two reports of progress."""

_Key = Annotated[str, Field(min_length=1, max_length=255)]
_Slug = Annotated[str, Field(min_length=1, max_length=255)]


class _Answer(BaseModel):
    """A result, whose schema has the words below its fields."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class GenerateArguments(Parameters):
    """A generation to submit."""

    model: _Slug
    """The model's slug, from list_models."""
    input: dict[str, Any]
    """The model's parameters, as in the input_schema of get_model, for example {"prompt": "a cat"}."""
    idempotency_key: Annotated[str, Field(min_length=1, max_length=MAX_KEY_LENGTH)]
    """Your name for this one generation, such as order-4711/hero. The same key never generates or costs
    twice: repeat a call that failed or timed out with the same key, and use a new key for another one."""
    max_cost: Annotated[float, Field(ge=0, le=MAX_CREDITS)] | None = None
    """The most credits that it may cost; a higher price is an error, and nothing is submitted."""
    metadata: dict[str, str] | None = None
    """Texts of yours that are returned with the generation."""


class GenerationArguments(Parameters):
    """A generation."""

    id: _Key
    """The `id` or the `request_id` of the generation."""


class WaitArguments(GenerationArguments):
    """A generation to wait for."""

    timeout_seconds: Annotated[float, Field(ge=0, le=MAX_WAIT_SECONDS)] = 60.0
    """How long to wait, in seconds."""


class NoArguments(Parameters):
    """No arguments."""


class ModelArguments(Parameters):
    """A model."""

    model: _Slug
    """The model's slug."""


class ModelsArguments(Parameters):
    """A kind of models."""

    type: Annotated[str, Field(max_length=64)] | None = None
    """Only models of this type, such as image, video or audio."""


class GeneratedFile(_Answer):
    """One file of a result."""

    id: UUID
    kind: str
    variant: str
    """`original` is the full-quality file, `display` a smaller one."""
    state: str
    """`stored` once the receiver has the whole file."""
    content_type: str | None
    size: int | None
    """Bytes."""
    sha256: str | None
    link: str | None
    """The stored file at the receiver; it needs the receiver's token. Null if it is not stored."""
    uri: str | None
    """The place in the receiver's storage."""
    clipia_url: str
    """Clipia's URL, which may expire."""
    error: str | None


class GenerationError(_Answer):
    """Why a generation failed or was not submitted."""

    code: str
    message: str


class Generation(_Answer):
    """One generation: a durable job of the receiver."""

    id: UUID
    request_id: str | None
    """Clipia's id; null until Clipia has accepted it."""
    state: JobState
    """`unsure`: Clipia may have it, and an operator decides; do not submit it under another key."""
    finished: bool
    """Whether it has ended and its files are stored or given up."""
    progress: int | None
    """Percent."""
    model: str
    idempotency_key: str
    is_new: bool | None
    """Of a generate tool: whether this call made it; false if the key was used before."""
    cost: Credits | None
    """The price in credits, which is reserved until the end."""
    charged: Credits | None
    """The credits that it has cost; null until that is known."""
    error: GenerationError | None
    warnings: list[str]
    """Parameters that the model ignores."""
    metadata: dict[str, str]
    created_at: datetime
    finished_at: datetime | None
    files: list[GeneratedFile]
    files_total: int


class ListedModel(_Answer):
    """A model of Clipia's."""

    slug: str
    name: str | None
    type: str | None
    capabilities: list[str]
    pricing: dict[str, Any]
    """In credits."""


class ModelList(_Answer):
    """Models of Clipia's."""

    models: list[ListedModel]


class ModelDetails(ListedModel):
    """A model with its parameters."""

    input_schema: Any
    """The parameters that `input` of a generate tool may have."""


async def _generate(session: Session, given: GenerateArguments) -> Generation:
    job = await session.client.submit_job(
        given.model,
        given.input,
        key=given.idempotency_key,
        metadata=given.metadata,
        max_cost=given.max_cost,
    )
    return generation_of(job, session, is_new=job.new)


async def _wait(session: Session, given: WaitArguments) -> Generation:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + given.timeout_seconds
    while True:
        left = max(0.0, deadline - loop.time())
        job = await session.client.show_job(given.id, wait=min(left, REPORT_SECONDS))
        if job.ended or not left or session.is_stopping():
            return generation_of(job, session)
        await session.report(float(job.progress or 0), f"{job.state}, {left:.0f} s left")


async def _get(session: Session, given: GenerationArguments) -> Generation:
    return generation_of(await session.client.show_job(given.id), session)


async def _list_models(session: Session, given: ModelsArguments) -> ModelList:
    rows = await session.client.list_models()
    models = [ListedModel(**fields) for row in rows if (fields := _model_fields(row)) is not None]
    return ModelList(models=[each for each in models if given.type in (None, each.type)][:MAX_MODELS])


async def _get_model(session: Session, given: ModelArguments) -> ModelDetails:
    row = await session.client.show_model(given.model)
    fields = _model_fields({"slug": given.model, **row})
    if fields is None:
        raise RequestError(f"There is no model {given.model[:64]!r}.", code="model_not_found")
    return ModelDetails(**fields, input_schema=row.get("input_schema"))


async def _get_balance(session: Session, _given: NoArguments) -> Account:
    return await session.client.show_account()


def generation_of(job: Job, session: Session, *, is_new: bool | None = None) -> Generation:
    """Return a job as a tool's result."""
    files = () if job.event is None else job.event.media
    error = job.error
    return Generation(
        **{name: getattr(job, name) for name in _SAME},
        finished=job.ended,
        is_new=is_new,
        error=None
        if error is None
        else GenerationError(code=_text(error, "code"), message=_text(error, "message")),
        warnings=[_text(each, "message") for each in job.warnings],
        files=[_file(each, session) for each in files[:MAX_FILES]],
        files_total=len(files),
    )


_SAME: Final = (
    *("id", "request_id", "state", "progress", "model", "idempotency_key", "cost", "charged", "metadata"),
    *("created_at", "finished_at"),
)
"""Fields of a job that a generation has, too."""


def _file(file: JobFile, session: Session) -> GeneratedFile:
    names = ("id", "kind", "variant", "state", "content_type", "size", "sha256", "uri", "error")
    return GeneratedFile(
        **{name: getattr(file, name) for name in names},
        link=file_link(session.internal_url, file.id, file.uri),
        clipia_url=file.url,
    )


def _text(values: dict[str, Any], name: str) -> str:
    """Return a text of Clipia's, which may leave it out."""
    return str(values.get(name) or "")


def _model_fields(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields of a model; None for a text model, to which no job can be submitted."""
    if not isinstance(row.get("slug"), str):
        return None
    pricing = row.get("pricing")
    return {
        "slug": row["slug"],
        "name": _text_or_none(row.get("name")),
        "type": _text_or_none(row.get("type")),
        "capabilities": [each for each in _list(row.get("capabilities")) if isinstance(each, str)],
        "pricing": pricing if isinstance(pricing, dict) else {},
    }


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _list(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else ()


def _generate_tool(kind: str) -> Tool:
    return Tool(
        name=f"generate_{kind}",
        title=f"Generate {'an' if kind == 'image' else 'a'} {kind}",
        description=(
            f"Submit one generation to Clipia with {'an' if kind == 'image' else 'a'} {kind} model, and "
            "return at once; then call wait_generation with its id. It costs credits: list_models and "
            "get_model have the prices, max_cost limits this call, and the token may have a budget of "
            "credits a day (error budget_exceeded). The input is checked against the model's schema before "
            "anything is paid. The generation is durable: it goes on if this session ends, and the same "
            "idempotency_key returns the same generation, which is never paid twice."
        ),
        scope="submit",
        arguments=GenerateArguments,
        answer=Generation,
        run=_generate,
        read_only=False,
        open_world=True,
    )


GENERATION_TOOLS: Final = (
    _generate_tool("image"),
    _generate_tool("video"),
    Tool(
        name="wait_generation",
        title="Wait for a generation",
        description=(
            "Wait until a generation has ended and its files are stored, but at most timeout_seconds (300). "
            "If `finished` is false, it is still running: call it again. It costs nothing."
        ),
        scope="read",
        arguments=WaitArguments,
        answer=Generation,
        run=_wait,
    ),
    Tool(
        name="get_generation",
        title="Show a generation",
        description=(
            "Show a generation as it is now: its state, price in credits, error, and its stored files with "
            "links, sizes in bytes and SHA-256 checksums. It costs nothing."
        ),
        scope="read",
        arguments=GenerationArguments,
        answer=Generation,
        run=_get,
    ),
    Tool(
        name="list_models",
        title="List models",
        description="List Clipia's models with their types and prices in credits. It costs nothing.",
        scope="read",
        arguments=ModelsArguments,
        answer=ModelList,
        run=_list_models,
        open_world=True,
    ),
    Tool(
        name="get_model",
        title="Show a model",
        description="Show a model with its price in credits and the schema of its input. It costs nothing.",
        scope="read",
        arguments=ModelArguments,
        answer=ModelDetails,
        run=_get_model,
        open_world=True,
    ),
    Tool(
        name="get_balance",
        title="Show the balance",
        description=(
            "Show the credits of the Clipia account, its limits, whether Clipia refuses it, and the sums "
            "of the receiver's own jobs of 30 days in credits. It costs nothing."
        ),
        scope="operate",
        arguments=NoArguments,
        answer=Account,
        run=_get_balance,
        open_world=True,
    ),
)
