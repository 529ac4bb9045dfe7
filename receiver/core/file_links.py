"""The links to stored files at the receiver's own address; pure."""

from typing import Final
from uuid import UUID

FILES_PATH: Final = "/v1/media"


def file_link(internal_url: str | None, file_id: UUID, storage_key: str | None) -> str | None:
    """Return the link to a file; None if it is not stored, or if the internal listener's URL is not set."""
    if internal_url is None or storage_key is None:
        return None
    return f"{internal_url}{FILES_PATH}/{file_id}"
