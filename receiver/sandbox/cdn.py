"""The sandbox's CDN: real sample files under any name, and videos of any size."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path, PurePosixPath
from typing import Final

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from receiver.sandbox.answers import Problem
from receiver.sandbox.options import SMALLEST_VIDEO_BYTES
from receiver.sandbox.state import Sandbox

SAMPLES: Final = Path(__file__).with_name("samples")
TYPES: Final = {".png": "image/png", ".webp": "image/webp", ".mp4": "video/mp4", ".mp3": "audio/mpeg"}
LARGEST_VIDEO_BYTES: Final = 2**40
CHUNK: Final = bytes(262_144)

Serve = Callable[[Request], Response]


def routes(sandbox: Sandbox) -> list[BaseRoute]:
    """Return the routes of the CDN."""

    def with_faults(serve: Serve) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            await asyncio.sleep(sandbox.options.media_latency)
            if sandbox.hit("media_missing_rate"):
                raise Problem("not_found", "There is no such file.")
            response = serve(request)
            cut = request.method == "GET" and sandbox.hit("media_truncate_rate")
            return TruncatedResponse(response) if cut else response

        return endpoint

    return [
        Route("/works/blob/{size:int}.mp4", with_faults(_blob)),
        Route("/works/{name}", with_faults(_sample)),
        Route("/sandbox/{name}", with_faults(_sample)),
    ]


def _sample(request: Request) -> Response:
    name = PurePosixPath(request.path_params["name"])
    if name.suffix not in TYPES:
        raise Problem("not_found", "There is no such file.")
    media_type = TYPES[name.suffix]
    stem = media_type.partition("/")[0]
    if stem == "audio":
        # The second track differs from the first, so that a mix-up of the two is noticed.
        stem += "-2" if name.stem.endswith("-2") else "-1"
    return FileResponse(SAMPLES / f"{stem}{name.suffix}", media_type=media_type)


def _blob(request: Request) -> Response:
    size = request.path_params["size"]
    if not SMALLEST_VIDEO_BYTES <= size <= LARGEST_VIDEO_BYTES:
        raise Problem("not_found", f"A video has from {SMALLEST_VIDEO_BYTES} to {LARGEST_VIDEO_BYTES} bytes.")
    headers = {"Content-Length": str(size)}
    if request.method == "HEAD":
        return Response(headers=headers, media_type="video/mp4")
    return StreamingResponse(_padded_video(size), headers=headers, media_type="video/mp4")


async def _padded_video(size: int) -> AsyncIterator[bytes]:
    """Yield the sample video, padded to `size` bytes with a `free` box, which players skip."""
    sample = (SAMPLES / "video.mp4").read_bytes()
    padding = size - len(sample)
    # The box's size field is 32 bits wide; 1 says that 64 bits follow the type.
    head = struct.pack(">I4sQ", 1, b"free", padding)
    yield sample + head
    padding -= len(head)
    while padding > 0:
        yield CHUNK[:padding]
        padding -= len(CHUNK)


class _Cut(Exception):
    pass


class TruncatedResponse(Response):
    """Sends another response's Content-Length, but only the first half of its body.

    The server cuts the connection if an application returns before the end of the body.
    """

    def __init__(self, whole: Response) -> None:
        super().__init__()
        self._whole = whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the first half."""
        left = 0

        async def send_half(message: Message) -> None:
            nonlocal left
            if message["type"] == "http.response.start":
                left = int(dict(message["headers"])[b"content-length"]) // 2
                await send(message)
                return
            body = message["body"][:left]
            left -= len(body)
            await send({"type": "http.response.body", "body": body, "more_body": True})
            if not left:
                raise _Cut

        try:
            await self._whole(scope, receive, send_half)
        except _Cut:
            return
