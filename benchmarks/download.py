"""Megabytes per second of downloads: one large file, plain and over TLS, and many small ones, against curl.

A server on the loopback sends videos from memory. The receiver downloads eight files at a time, as its worker
does: with the guard, the checks, the SHA-256 and a flush to the disk for each. curl downloads one file after
the other and flushes it; the table has curl alone, and curl with sha256sum, which is the same work.

    python benchmarks/download.py --mebibytes 1024 --files 500 --rounds 3

Needs the development dependencies and curl.
"""

import argparse
import asyncio
import os
import resource
import shutil
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.certificates import make_certificate

from receiver.media import Downloader, MediaHosts, open_storage

MIB = 1024 * 1024
AT_ONCE = 8
BLOCK = b"\x5a" * MIB


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send a video for every request on a connection; the path names its size in bytes."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.split(b" ")[1].split(b"/")[1])
            boxes = struct.pack(">I4s4s4s", 16, b"ftyp", b"isom", bytes(4))
            boxes += struct.pack(">I4s", 208, b"moov") + bytes(200)
            boxes += struct.pack(">I4sQ", 1, b"mdat", size - len(boxes))
            fields = b"Content-Type: video/mp4\r\nContent-Length: %d\r\n\r\n" % size
            writer.write(b"HTTP/1.1 200 OK\r\n" + fields + boxes)
            rest = size - len(boxes)
            while rest:
                part = min(rest, MIB)
                writer.write(BLOCK if part == MIB else BLOCK[:part])
                rest -= part
                await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


@contextmanager
def serving(certificate: Path) -> Iterator[list[str]]:
    """Run the server as a process of its own; yield its origins, the one with TLS last."""
    command = [sys.executable, __file__, "--serve", str(certificate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().split()
        finally:
            process.terminate()


async def serve(certificate: str) -> None:
    """Print the origins, and serve until terminated."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    plain = await asyncio.start_server(answer, "127.0.0.1", 0)
    secure = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    ports = [server.sockets[0].getsockname()[1] for server in (plain, secure)]
    print(f"http://127.0.0.1:{ports[0]} https://127.0.0.1:{ports[1]}", flush=True)
    await asyncio.gather(plain.serve_forever(), secure.serve_forever())


async def download(origin: str, folder: Path, *, ca: Path, count: int, size: int) -> None:
    """Download as the worker does."""
    storage = open_storage(f"file:{folder}")
    downloader = Downloader(hosts=MediaHosts.parse([origin]), storage=storage, ca=str(ca))
    await downloader.start()
    places = asyncio.Semaphore(AT_ONCE)

    async def save(number: int) -> None:
        async with places:
            stored = await downloader.save(
                url=f"{origin}/{size}/{number}", kind="video", stem=f"{number}/00-original"
            )
        if (stored.size, stored.content_type) != (size, "video/mp4"):
            raise RuntimeError(f"got {stored}")

    await asyncio.gather(*(save(number) for number in range(count)))
    await downloader.close()
    await storage.close()


def curl(origin: str, folder: Path, *, ca: Path, count: int, size: int, digest: bool) -> None:
    """Download one file after the other."""
    folder.mkdir()
    for number in range(count):
        file = folder / str(number)
        command = ["curl", "-sS", "--cacert", str(ca), "-o", str(file), f"{origin}/{size}/{number}"]
        subprocess.run(command, check=True)
        if digest:
            subprocess.run(["sha256sum", file], check=True, stdout=subprocess.DEVNULL)
        with file.open("rb") as written:
            os.fsync(written.fileno())


def rates(origin: str, folder: Path, *, ca: Path, count: int, size: int) -> tuple[float, float, float]:
    """Return megabytes per second of the receiver, of curl, and of curl and sha256sum."""
    found = []
    for side in ("receiver", "curl", "curl and sha256sum"):
        target = folder / "files"
        began = time.perf_counter()
        if side == "receiver":
            uvloop.run(download(origin, target, ca=ca, count=count, size=size))
        else:
            curl(origin, target, ca=ca, count=count, size=size, digest=side != "curl")
        found.append(count * size / (time.perf_counter() - began) / 1e6)
        shutil.rmtree(target)
    return found[0], found[1], found[2]


def row(name: str, rounds: Sequence[tuple[float, float, float]]) -> str:
    """Return a line of the table: medians, and the medians of the ratios."""
    sides = [f"{statistics.median(each[side] for each in rounds):,.0f}" for side in range(3)]
    ratios = []
    for side in (1, 2):
        values = [each[0] / each[side] for each in rounds]
        ratios.append(f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    return f"| {name} | {' | '.join([*sides, *ratios])} |"


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mebibytes", type=int, default=1024, help="size of the large file")
    parser.add_argument("--files", type=int, default=500, help="small files, of 1 MiB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", metavar="CERTIFICATE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(options.serve))
        return
    large, secure, small = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder, ca = Path(name), make_certificate(Path(name) / "server.pem")
        with serving(ca) as (plain, tls):
            for _ in range(options.rounds):
                size = options.mebibytes * MIB
                large.append(rates(plain, folder, ca=ca, count=1, size=size))
                secure.append(rates(tls, folder, ca=ca, count=1, size=size))
                small.append(rates(plain, folder, ca=ca, count=options.files, size=MIB))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{options.rounds} rounds; medians in MB/s, in brackets the least and the greatest ratio; "
        f"largest resident size {memory} MiB\n"
    )
    print("| Files | receiver | curl | curl and sha256sum | ÷ curl | ÷ curl and sha256sum |")
    print("|---|---|---|---|---|---|")
    print(row(f"1 of {options.mebibytes} MiB", large))
    print(row(f"1 of {options.mebibytes} MiB over TLS", secure))
    print(row(f"{options.files} of 1 MiB", small))


if __name__ == "__main__":
    main()
