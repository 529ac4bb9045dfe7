"""`/v1/media/{id}`: a stored file, streamed from a folder or redirected to its bucket."""

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar
from uuid import UUID

import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from receiver.api.answers import AnswerCut, error_response, in_time
from receiver.api.endpoints import Call, Endpoint, not_found
from receiver.api.parameters import Parameters, QueryFlag
from receiver.core.byte_range import find_range
from receiver.core.file_links import FILES_PATH
from receiver.db.database import Database
from receiver.db.files import ServedFile, find_file
from receiver.errors import RequestError, StorageUnavailable
from receiver.media import Storage
from receiver.media.file_types import KNOWN_TYPES
from receiver.media.storage.base import ANY_TYPE

LINK_SECONDS: Final = 300
"""How long a URL to a bucket is valid: its client requests it at once."""
MAX_DOWNLOADS: Final = 16
"""Files that a process sends at once; each has two blocks of 512 KiB in memory at most."""
LOOK_SECONDS: Final = 15.0
"""How long a call waits for the storage's first answer."""
MAX_HANGING: Final = 4
"""If so many looks at the storage hang, no other one begins: each keeps a thread."""
STALL_SECONDS: Final = 30.0
"""How long a client may read nothing before its connection is aborted."""

_SAFE_HEADERS: Final = {
    "cache-control": "private, no-cache",
    "content-security-policy": "default-src 'none'; sandbox",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""A browser that opens a file must neither guess its type nor run it."""
_EXTENSION: Final = re.compile(r"\.[a-z0-9]{1,8}")

T = TypeVar("T")

log = structlog.get_logger()


def _header(name: str, description: str, example: str) -> dict[str, Any]:
    schema = {"type": "string"}
    return {"name": name, "in": "header", "description": description, "schema": schema, "example": example}


_FILE_CONTENT: Final = {"*/*": {"schema": {}, "example": "the bytes of the file"}}
_ETAG: Final = {"ETag": {"description": "The file's SHA-256.", "schema": {"type": "string"}}}


class FileQuery(Parameters):
    """How a file of a bucket is sent."""

    redirect: QueryFlag = True
    """Whether the answer may be a redirect; `false` is for clients that cannot reach the bucket."""


class FileEndpoints:
    """The endpoint needs `read`, whichever caller the job had: the id is in the message alone, and random."""

    def __init__(self, database: Database, *, open_storage: Callable[[], Storage]) -> None:
        self._database = database
        self._open_storage = open_storage
        self._opened: Storage | None = None
        self._hanging: set[asyncio.Future[Any]] = set()
        """Looks at the storage that have not ended in time."""
        self._places = asyncio.Semaphore(MAX_DOWNLOADS)

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="GET",
                path=f"{FILES_PATH}/{{id}}",
                scope="read",
                handler=self._send,
                name="get_file",
                summary="Get a stored file: its bytes, or a redirect to its bucket",
                query=FileQuery,
                headers=(
                    _header("Range", "One range of bytes; several are answered with the file.", "bytes=0-99"),
                    _header("If-Range", "The `ETag` that the range is of.", '"9f86d081…"'),
                    _header("If-None-Match", "The `ETag` of the client's copy.", '"9f86d081…"'),
                ),
                other_answers=(
                    (200, {"description": "The file.", "content": _FILE_CONTENT, "headers": _ETAG}),
                    (206, {"description": "The range.", "content": _FILE_CONTENT, "headers": _ETAG}),
                    (304, {"description": "The client's copy is the file."}),
                    (307, {"description": f"`Location` is a URL of the bucket, for {LINK_SECONDS} seconds."}),
                ),
                errors=(
                    *("not_found", "not_stored", "file_missing", "file_changed"),
                    *("range_not_satisfiable", "not_configured"),
                ),
            )
        ]

    async def _storage(self) -> Storage:
        # Opened by the first call: a process without a worker must be able to start without a storage. A
        # bucket's client is kept, because it has connections.
        if self._opened is None:
            self._opened = await self._look(asyncio.to_thread(self._open_storage))
        return self._opened

    async def _look(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a look at the storage, but not for a folder that hangs. Raises StorageUnavailable."""
        away = StorageUnavailable("the storage does not answer", reason="error")
        if len(self._hanging) >= MAX_HANGING:
            work.close()
            raise away
        look = asyncio.ensure_future(work)
        # A thread cannot be cancelled, and `wait` does not try.
        await asyncio.wait({look}, timeout=LOOK_SECONDS)
        if not look.done():
            self._hanging.add(look)
            look.add_done_callback(self._end)
            raise away
        return look.result()

    def _end(self, look: asyncio.Future[Any]) -> None:
        self._hanging.discard(look)
        # Retrieved, or asyncio would report it as lost.
        look.cancelled() or look.exception()

    async def _send(self, call: Call[FileQuery, None]) -> Response:
        file = None if call.id is None else await self._find(call.id)
        if file is None:
            raise not_found("file")
        try:
            storage = await self._storage()
            key, size = await self._locate(file, storage)
            url = await self._look(storage.link(key, seconds=LINK_SECONDS)) if call.query.redirect else None
        except StorageUnavailable as error:
            raise _storage_away(file.id, error) from None
        if url is not None:
            return Response(
                b"", 307, {"location": url, "cache-control": "no-store", "referrer-policy": "no-referrer"}
            )
        return self._answer(call.request, file, key, size)

    async def _find(self, file_id: UUID) -> ServedFile | None:
        async with self._database.read() as connection:
            return await find_file(connection, file_id)

    async def _locate(self, file: ServedFile, storage: Storage) -> tuple[str, int]:
        """Return the key and the size of a stored file. Raises RequestError and StorageUnavailable."""
        if file.storage_key is None:
            reason = f": {file.error}" if file.error else ""
            raise RequestError(f"the file is {file.state}{reason}", code="not_stored")
        try:
            is_ours = storage.uri(file.storage_key) == file.uri
        except ValueError:  # an imported row may have any key
            is_ours = False
        size = await self._look(storage.stat(file.storage_key)) if is_ours else None
        if size is None:
            raise RequestError(
                "the file is not in the storage of RECEIVER_STORAGE_URL; "
                "`receiver replay --media` downloads it again",
                code="file_missing",
            )
        if size != file.size:
            raise RequestError(
                f"the file has {size} bytes and not {file.size}, as it had when it was stored; "
                "`receiver replay --media` downloads it again",
                code="file_changed",
            )
        return file.storage_key, size

    def _answer(self, request: Request, file: ServedFile, key: str, size: int) -> Response:
        """Return the file or a range of it from the storage itself. Raises RequestError."""
        headers = _headers_of(file, key)
        if headers["etag"] in _tags(request.headers.get("if-none-match")):
            return Response(b"", 304, headers)
        is_same = request.headers.get("if-range") in (None, headers["etag"])
        try:
            found = find_range(request.headers.get("range") if is_same else None, size)
        except ValueError:
            error = RequestError(f"the file has {size} bytes", code="range_not_satisfiable")
            answer = error_response(error)
            answer.headers["content-range"] = f"bytes */{size}"
            return answer
        start, end = found or (0, size)
        if found is not None:
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
        headers["content-length"] = str(end - start)
        status = 200 if found is None else 206
        if request.method == "HEAD":
            return Response(None, status, headers)
        if self._places.locked():
            raise RequestError(
                f"This process sends {MAX_DOWNLOADS} files already; ask again.",
                code="service_unavailable",
                type_="api_error",
            )
        return _FileResponse(self._places, self._blocks(file, key, start, end), status, headers)

    async def _blocks(self, file: ServedFile, key: str, start: int, end: int) -> AsyncGenerator[bytes]:
        """Iterate over a range. Raises AnswerCut if the file cannot be read, or is not the recorded one.

        The digest is known at the end of a whole file only: until then its last block is held back, so that
        no client gets a complete answer with other bytes.
        """
        left, held, digest = end - start, b"", hashlib.sha256()
        try:
            async with aclosing((await self._storage()).open(key, start=start)) as blocks:
                async for block in blocks:
                    if held:
                        yield held
                    held = block[:left]
                    left -= len(held)
                    if not left:
                        break
                    await asyncio.to_thread(digest.update, held)
        except (FileNotFoundError, StorageUnavailable) as error:
            log.warning("file not sent to its end", file_id=str(file.id), error=type(error).__name__)
            raise AnswerCut from None
        await asyncio.to_thread(digest.update, held)
        if left or (end - start == file.size and digest.hexdigest() != file.sha256):
            log.error("a stored file differs from its checksum", file_id=str(file.id))
            raise AnswerCut
        yield held


class _FileResponse(StreamingResponse):
    """Sends the blocks of a file. If its client reads nothing for a while, its connection is aborted."""

    def __init__(
        self,
        places: asyncio.Semaphore,
        blocks: AsyncGenerator[bytes],
        status: int,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(blocks, status, headers)
        self._places = places
        self._blocks = blocks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._places, aclosing(self._blocks):
            await super().__call__(scope, receive, in_time(send, STALL_SECONDS))


def _headers_of(file: ServedFile, key: str) -> dict[str, str]:
    # An imported row may have any type.
    content_type = file.content_type if file.content_type in KNOWN_TYPES else ANY_TYPE
    extension = _EXTENSION.search(key, len(key) - 9)
    name = f"{file.id}{extension[0] if extension else ''}"
    return {
        **_SAFE_HEADERS,
        "accept-ranges": "bytes",
        "content-disposition": f'attachment; filename="{name}"',
        "content-type": content_type,
        "etag": f'"{file.sha256}"',
    }


def _tags(header: str | None) -> set[str]:
    return {tag.strip().removeprefix("W/") for tag in (header or "").split(",")}


def _storage_away(file_id: UUID, error: StorageUnavailable) -> RequestError:
    log.warning("file not served", file_id=str(file_id), error=str(error))
    return RequestError(
        "The storage is unavailable; ask again.", code="service_unavailable", type_="api_error"
    )
