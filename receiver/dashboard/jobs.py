"""Jobs: the list, Clipia's account, credits, and the freeze of submissions."""

from typing import TYPE_CHECKING, Final, get_args

from starlette.responses import Response

from receiver.dashboard.events import read_metadata
from receiver.dashboard.pages import HOME, Page, View, Visit, done
from receiver.db.rows import CostGroup, JobState
from receiver.errors import ClipiaUnavailable, SettingsError

if TYPE_CHECKING:
    from receiver.submitter.account_status import Account

PAGE_ROWS: Final = 50
_ACCOUNT: Final = f"{HOME}/jobs/account"
COSTS_SINCE: Final = "30d"


async def show_all(visit: Visit) -> View:
    """List jobs."""
    filters = visit.filters("state", "model", "caller", "since", "until")
    metadata = visit.filters("metadata")
    page = await visit.client.list_jobs(
        limit=PAGE_ROWS,
        cursor=visit.request.query_params.get("cursor"),
        metadata=read_metadata(metadata.get("metadata", "")),
        **filters,
    )
    values = {
        "page": page,
        "filters": filters | metadata,
        "states": get_args(JobState),
        "freeze": await visit.client.show_freeze(),
    }
    return View(template="jobs.html", values=values)


async def show_account(visit: Visit) -> View:
    """Show Clipia's account and the credits of jobs; the receiver's own figures do not need Clipia."""
    filters = {"by": "day", "since": COSTS_SINCE, **visit.filters("by", "caller", "since", "until")}
    account: Account | None = None
    error: str | None = None
    try:
        account = await visit.client.show_account()
    except (ClipiaUnavailable, SettingsError) as raised:
        error = str(raised)
    values = {
        "account": account,
        "error": error,
        "filters": filters,
        "groups": get_args(CostGroup),
        "costs": await visit.client.sum_costs(**filters),
        "freeze": await visit.client.show_freeze(),
    }
    return View(template="account.html", values=values)


async def freeze(visit: Visit) -> Response:
    """Accept and submit no jobs."""
    await visit.client.freeze_submissions(
        reason=visit.field("reason"), restored=bool(visit.field("restored"))
    )
    return done(_ACCOUNT, "frozen")


async def thaw(visit: Visit) -> Response:
    """Accept and submit jobs again."""
    found = await visit.client.thaw_submissions(reason=visit.reason)
    return done(_ACCOUNT, "thawed", count=len(found["unsure"]))


PAGES = (
    Page(path="/jobs", handler=show_all),
    Page(path="/jobs/account", handler=show_account),
    Page(method="POST", path="/jobs/freeze", handler=freeze),
    Page(method="POST", path="/jobs/thaw", handler=thaw),
)
