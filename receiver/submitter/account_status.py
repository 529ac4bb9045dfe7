"""How a Clipia account stands: whether jobs are accepted, and which are not."""

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.core.quota import Quota
from receiver.db import accounts, freezes, refused_jobs


@dataclass(frozen=True, kw_only=True)
class AccountStatus:
    """What is known of an account."""

    quota: Quota
    pause: str | None
    """What Clipia said when it refused the account, as JSON; None if it does not."""
    refused_jobs: int
    """Jobs that Clipia refuses for now (402, 403), each for itself."""
    frozen: bool

    @property
    def paused(self) -> bool:
        """Whether no job is accepted."""
        return self.pause is not None or self.frozen


async def read_account_status(connection: AsyncConnection, account: str) -> AccountStatus:
    """Read how an account stands.

    It counts as refused after a 401, and while Clipia refuses several models and prices and accepts none.
    """
    quota = await accounts.read(connection, account)
    pause = quota.pause if quota.paused_at else None
    refused = await refused_jobs.count(connection, account)
    if pause is None and refused:
        pause = await refused_jobs.find_account_refusal(connection, account, accepted_at=quota.accepted_at)
    frozen = await freezes.find(connection) is not None
    return AccountStatus(quota=quota, pause=pause, refused_jobs=refused, frozen=frozen)
