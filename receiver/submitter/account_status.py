"""The status of a Clipia account: whether it is paused, and how many jobs Clipia refuses."""

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.core.quota import Quota
from receiver.db import accounts, freezes, refused_jobs


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
        """Whether no jobs are submitted."""
        return self.pause is not None or self.frozen


async def read_account_status(connection: AsyncConnection, account: str) -> AccountStatus:
    """Read the status of an account.

    It counts as refused after a 401, and also if Clipia refuses several models and prices and accepts none.
    """
    quota = await accounts.read(connection, account)
    pause = quota.pause if quota.paused_at else None
    refused = await refused_jobs.count(connection, account)
    if pause is None and refused:
        pause = await refused_jobs.find_account_refusal(connection, account, accepted_at=quota.accepted_at)
    frozen = await freezes.find(connection) is not None
    return AccountStatus(quota=quota, pause=pause, refused_jobs=refused, frozen=frozen)
