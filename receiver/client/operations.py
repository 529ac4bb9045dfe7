"""The calls of the client about the service itself."""

from datetime import datetime

from receiver.client.calls import Calls, Page
from receiver.core.alerting import AlertKind
from receiver.db.alerts import AlertState, ShownAlert
from receiver.db.audit import Action
from receiver.db.retention_runs import RetentionRun
from receiver.settings_report import SettingsReport
from receiver.status import Status, WorkerStatus


class OperationCalls(Calls):
    """The status, alerts, and the actions of operators."""

    async def show_status(self) -> Status:
        """Return lanes, destinations, workers, jobs and disks, and the problems in them."""
        found: Status = await self._get(Status, "/v1/status")
        return found

    async def show_settings(self) -> SettingsReport:
        """Return the settings in force of the receiver's process, without a secret."""
        found: SettingsReport = await self._get(SettingsReport, "/v1/settings")
        return found

    async def list_workers(self) -> list[WorkerStatus]:
        """Return the worker processes that run or crashed lately, with their lanes."""
        page: Page[WorkerStatus] = await self._get(Page[WorkerStatus], "/v1/workers")
        return page.data

    async def list_actions(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        by: str | None = None,
        operation: str | None = None,
        target: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Page[Action]:
        """Return actions of operators with their reasons and outcomes, newest first."""
        query = {
            "cursor": cursor,
            "by": by,
            "operation": operation,
            "target": target,
            "since": since,
            "until": until,
        }
        return await self._list(Action, "/v1/audit", query, limit=limit)

    async def list_retention_runs(self, *, limit: int = 50) -> Page[RetentionRun]:
        """Return the runs of retention with their numbers, newest first."""
        return await self._list(RetentionRun, "/v1/retention", {}, limit=limit)

    async def list_alerts(
        self, *, limit: int = 200, state: AlertState | None = None, alert: AlertKind | None = None
    ) -> Page[ShownAlert]:
        """Return alerts, open ones first."""
        query = {"state": state, "alert": alert}
        return await self._list(ShownAlert, "/v1/alerts", query, limit=limit)
