"""A collector of spans: OTLP over HTTP. It also takes the events of an HTTP destination."""

import gzip
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PARENT = "parent"


@dataclass(frozen=True, kw_only=True)
class Received:
    """A span that was exported; ids are in hexadecimal digits."""

    name: str
    trace_id: str
    span_id: str
    parent: str
    """Empty for a root."""
    kind: int
    attributes: Mapping[str, Any]
    service: Mapping[str, Any]
    failed: bool
    began: int
    ended: int

    def texts(self) -> str:
        """Return all that it says, to look for secrets."""
        return repr((self.name, self.attributes, self.service))


class Collector:
    """Takes spans, or answers with an error, or never."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.posts: list[tuple[Mapping[str, str], bytes]] = []
        """The requests of paths that are not OTLP's: headers with names in lower case, and the body."""
        self.headers: list[Mapping[str, str]] = []
        """Those of the requests with spans."""
        self.status = 200
        self.hangs = False
        self._closing = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status = collector._take(self.path, headers, body)
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, condition: Callable[[list[Received]], bool], *, seconds: float = 30) -> list[Received]:
        """Wait until the spans meet a condition; return them."""
        deadline = time.monotonic() + seconds
        while not condition(list(self.spans)):
            assert time.monotonic() < deadline, f"spans so far: {sorted(each.name for each in self.spans)}"
            time.sleep(0.02)
        return list(self.spans)

    def _take(self, path: str, headers: Mapping[str, str], body: bytes) -> int:
        if path != "/v1/traces":
            self.posts.append((headers, body))
            return 200
        self.headers.append(headers)
        if self.hangs:
            self._closing.wait(60)
        if self.status == 200:
            self.spans += _decode(gzip.decompress(body) if "content-encoding" in headers else body)
        return self.status


def _decode(body: bytes) -> list[Received]:
    request = ExportTraceServiceRequest.FromString(body)
    return [
        Received(
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent=span.parent_span_id.hex(),
            kind=span.kind,
            attributes=_values(span.attributes),
            service=_values(resource.resource.attributes),
            failed=span.status.code == 2,
            began=span.start_time_unix_nano,
            ended=span.end_time_unix_nano,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
