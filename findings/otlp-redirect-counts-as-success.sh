#!/usr/bin/env bash
# OpenTelemetry's OTLP exporter over HTTP takes a redirect for a success: the spans are lost without a word.
#
# The exporter does not follow redirects, and counts each status from 200 to 399 as exported. A collector behind a proxy
# that redirects http to https, or /v1/traces to a login page, gets no span, and nothing is logged.
#
# Exits with 0 if it behaves like this, with 1 if it no longer does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  opentelemetry-sdk==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2
cat > "$folder/export.py" <<'PYTHON'
import logging
import platform
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from threading import Thread
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

seen: list[str] = []
records: list[str] = []


class Redirect(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        seen.append(f"POST {self.path}")
        self.send_response(302)
        self.send_header("location", "/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        seen.append(f"GET {self.path}")
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


class Kept(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("opentelemetry"):
            records.append(record.getMessage())


logging.getLogger().addHandler(Kept())
server = ThreadingHTTPServer(("127.0.0.1", 0), Redirect)
Thread(target=server.serve_forever, daemon=True).start()
exporter = OTLPSpanExporter(endpoint=f"http://127.0.0.1:{server.server_port}/v1/traces")
span = TracerProvider().get_tracer("finding").start_span("lost")
span.end()
result = exporter.export([span])
print(f"Python {platform.python_version()}, opentelemetry-exporter-otlp-proto-http", end=" ")
print(version("opentelemetry-exporter-otlp-proto-http"))
print("requests:", seen)
print("result:", result, "log:", records)
is_so = result is SpanExportResult.SUCCESS and seen == ["POST /v1/traces"] and not records
print("as described" if is_so else "NOT as described any more")
sys.exit(0 if is_so else 1)
PYTHON
"$folder/venv/bin/python" "$folder/export.py"
