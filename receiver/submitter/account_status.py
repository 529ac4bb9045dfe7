"""The status of a Clipia account: whether it is paused, and how many jobs Clipia refuses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, cast

from pydantic import ConfigDict, with_config

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.core.quota import Quota
from receiver.db import accounts, refused_jobs, submission_freezes
from receiver.db.connection import SqlConnection
from receiver.db.views import JobCosts
from receiver.price import Credits, read_credits, total
from receiver.submitter.job import read_error


class JobTotals(TypedDict):
    """Sums over our own jobs, in credits."""

    jobs: int
    reserved: Credits
    charged: Credits
    refunded: Credits


class AccountLimits(TypedDict):
    """The quota of an account, and the number of jobs that Clipia refuses for now."""

    requests_per_minute: int
    in_flight: int
    paused: dict[str, Any] | None
    refused_jobs: int


@with_config(ConfigDict(extra="allow"))
class Account(TypedDict):
    """Clipia's account, and our figures for it."""

    account_id: NotRequired[Any]
    balance: NotRequired[Any]
    usage_30d: NotRequired[Any]
    ledger_30d: JobTotals
    difference_30d: Credits | None
    limits: AccountLimits


@dataclass(frozen=True, kw_only=True)
class AccountStatus:
    """The status of one account."""

    quota: Quota
    pause: str | None
    """Clipia's error as JSON if it refuses the account, else None."""
    refused_jobs: int
    """Jobs that Clipia refuses for now (402, 403)."""
    frozen: bool

    @property
    def paused(self) -> bool:
        """Whether submissions are stopped, except for probes."""
        return self.pause is not None or self.frozen


async def read_account_status(connection: SqlConnection, account: str) -> AccountStatus:
    """Read the status of an account.

    The account counts as refused after a 401, and also if Clipia refuses several models and prices and
    accepts none.
    """
    quota = await accounts.read(connection, account)
    pause = quota.pause if quota.paused_at else None
    refused = await refused_jobs.count(connection, account)
    if pause is None and refused:
        pause = await refused_jobs.find_account_refusal(connection, account, accepted_at=quota.accepted_at)
    frozen = await submission_freezes.find(connection) is not None
    return AccountStatus(quota=quota, pause=pause, refused_jobs=refused, frozen=frozen)


def account_report(answer: dict[str, Any], costs: Sequence[JobCosts], status: AccountStatus) -> Account:
    """Return Clipia's answer about an account together with our figures; `costs` are those of 30 days."""
    charged = total(row["charged"] for row in costs)
    spent = read_credits((answer.get("usage_30d") or {}).get("credits_spent"))
    figures: Account = {
        "ledger_30d": {
            "jobs": sum(row["jobs"] for row in costs),
            "reserved": total(row["reserved"] for row in costs),
            "charged": charged,
            "refunded": total(row["refunded"] for row in costs),
        },
        "difference_30d": None if spent is None else total((spent, -charged)),
        "limits": {
            "requests_per_minute": status.quota.requests_per_minute,
            "in_flight": status.quota.in_flight_limit,
            "paused": read_error(status.pause),
            "refused_jobs": status.refused_jobs,
        },
    }
    return cast("Account", answer | figures)
