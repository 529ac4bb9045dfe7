"""`/v1/settings`: the settings in force, without a secret."""

from collections.abc import Callable
from typing import Any, Final

from starlette.responses import Response

from receiver.api.endpoints import Call, Endpoint, json_response
from receiver.settings_report import SettingsReport

EXAMPLE: Final[dict[str, Any]] = {
    "settings": [
        {"name": "CLIPIA_KEY", "value": "clipia_live_[masked]", "origin": "environment", "is_secret": True},
        {"name": "RECEIVER_POLL_AFTER", "value": "60.0", "origin": "default", "is_secret": False},
    ],
    "destinations": [
        {
            "name": "orders",
            "url": "https://orders.internal/…",
            "when": "media_stored",
            "gets": "status OK, and alerts",
            "options": "8 at once",
        }
    ],
    "sources": [
        {"name": "clipia", "environment": None, "secret_ids": ["1f0c8d19"], "retired_secret_ids": []}
    ],
    "tokens": [{"name": "oncall", "scopes": ["operate", "read"]}],
}


class SettingsEndpoints:
    """The endpoint needs the scope `operate`: the settings tell where everything is."""

    def __init__(self, read: Callable[[], SettingsReport]) -> None:
        self._read = read

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="GET",
                path="/v1/settings",
                scope="operate",
                handler=self._show,
                name="show_settings",
                summary="Show the settings in force of the process that answers, without a secret",
                answer=SettingsReport,
                example=EXAMPLE,
            )
        ]

    async def _show(self, _call: Call[None, None]) -> Response:
        return json_response(self._read())
