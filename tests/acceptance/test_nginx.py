"""A real nginx in front of the receiver, as in production."""

import http.client
import random
import select
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from support.commands import ReceiverProcess
from support.payloads import body, signed
from support.servers import end, free_port, missing, wait_for_port

from receiver.settings import Settings

SECONDS = 30.0
NGINX_KEEPS = 1
RECEIVER_KEEPS = 3
"""Seconds for which nginx and the receiver keep an idle connection."""
CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream receiver {{
        server 127.0.0.1:{upstream};
        keepalive 16;
        keepalive_timeout {keep_alive}s;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://receiver;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
}}
"""


@contextmanager
def nginx(folder: Path, receiver: ReceiverProcess, *, keep_alive: int) -> Iterator[int]:
    """Run an nginx that keeps idle connections for `idle` seconds; yield its port."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") or ""
    if not program:
        missing("nginx", "apt-get install nginx")
    folder.mkdir()
    port = free_port()
    file = folder / "nginx.conf"
    file.write_text(
        CONFIGURATION.format(
            folder=folder, port=port, upstream=urlsplit(receiver.url).port, keep_alive=keep_alive
        )
    )
    process = subprocess.Popen(
        [program, "-p", str(folder), "-c", str(file), "-e", str(folder / "error.log")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        yield port
    finally:
        end(process)


def post(port: int) -> int:
    """Post a webhook through nginx and return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        content = body()
        connection.request("POST", "/clipia/webhook", body=content, headers=signed(content))
        return connection.getresponse().status
    finally:
        connection.close()


def post_after_gaps(port: int) -> list[int]:
    """Post repeatedly around the end of idle connections; return the statuses."""
    statuses = []
    for gap in [NGINX_KEEPS] * 8 + [RECEIVER_KEEPS] * 4:
        statuses.append(post(port))
        time.sleep(gap + random.uniform(-0.004, 0.004))
    return [*statuses, post(port)]


def test_no_bad_gateway_across_idle_gaps(tmp_path: Path) -> None:
    """B12: if the receiver keeps idle connections longer than nginx, no webhook is a 502."""
    receiver = ReceiverProcess(tmp_path, RECEIVER_KEEP_ALIVE=str(RECEIVER_KEEPS))
    with (
        receiver,
        nginx(tmp_path / "nginx", receiver, keep_alive=NGINX_KEEPS) as port,
        ThreadPoolExecutor(16) as pool,
    ):
        statuses = Counter(status for each in pool.map(post_after_gaps, [port] * 16) for status in each)
    assert statuses == {200: 16 * 13}


class Idle:
    """A client that sends requests on one connection."""

    def __init__(self, receiver: ReceiverProcess) -> None:
        address = urlsplit(receiver.url)
        self.connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SECONDS)

    def ask(self) -> None:
        """Request a page."""
        self.connection.request("GET", "/livez")
        answer = self.connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"ok"}')

    def is_closed(self) -> bool:
        """Return whether the receiver has closed the connection."""
        return bool(select.select([self.connection.sock], [], [], 0)[0])


def test_an_idle_connection_outlasts_those_of_proxies(tmp_path: Path) -> None:
    """B12: by default an idle connection is kept longer than uvicorn's 5 s, after each request."""
    assert Settings.model_fields["keep_alive"].default > 60
    with ReceiverProcess(tmp_path) as receiver:
        idle = Idle(receiver)
        for _ in range(2):
            idle.ask()
            time.sleep(7)
            assert not idle.is_closed()
        idle.connection.close()


def test_the_keep_alive_is_a_setting(tmp_path: Path) -> None:
    """B1: an idle connection is closed after RECEIVER_KEEP_ALIVE seconds."""
    with ReceiverProcess(tmp_path, RECEIVER_KEEP_ALIVE="1") as receiver:
        idle = Idle(receiver)
        idle.ask()
        deadline = time.monotonic() + SECONDS
        while not idle.is_closed():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        idle.connection.close()
