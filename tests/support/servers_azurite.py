"""Azurite, Microsoft's emulator of Azure's blob storage, with one empty container."""

import base64
import hashlib
import hmac
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Final

import httpx

from support.npm import install
from support.servers import end, free_port, wait_for_port

# The newest one that runs on the Node.js of Debian 12.
AZURITE: Final = "azurite@3.35.0"
ACCOUNT: Final = "devstoreaccount1"
# Public knowledge: the key is built into the emulator.
KEY: Final = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION: Final = "2021-08-06"


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container on a local Azurite."""

    endpoint: str
    name: str

    @property
    def url(self) -> str:
        """The value of RECEIVER_STORAGE_URL."""
        return f"az://{self.name}/some/prefix?endpoint={self.endpoint}&account={ACCOUNT}"

    def request(self, method: str, query: Mapping[str, str]) -> httpx.Response:
        """Send a signed request about the container."""
        date = formatdate(usegmt=True)
        resource = f"/{ACCOUNT}/{ACCOUNT}/{self.name}" + "".join(
            f"\n{name}:{value}" for name, value in sorted(query.items())
        )
        text = f"{method}{chr(10) * 12}x-ms-date:{date}\nx-ms-version:{VERSION}\n{resource}"
        digest = hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)
        headers = {
            "x-ms-date": date,
            "x-ms-version": VERSION,
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        }
        url = f"{self.endpoint}/{self.name}"
        with httpx.Client(trust_env=False) as client:
            return client.request(method, url, params=dict(query), headers=headers).raise_for_status()

    def list_keys(self) -> list[str]:
        """List the blobs."""
        listing = self.request("GET", {"restype": "container", "comp": "list"}).text
        return [part.partition("</Name>")[0] for part in listing.split("<Name>")[1:]]


@contextmanager
def azurite(cache: Path, directory: Path) -> Iterator[Container]:
    """Run Azurite with one container; it checks signatures."""
    folder = install(cache, AZURITE)
    port = free_port()
    program = folder / "node_modules" / ".bin" / "azurite-blob"
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence", "--silent"]
    options += ["--skipApiVersionCheck", "--disableTelemetry"]
    with (directory / "azurite.log").open("wb") as output:
        process = subprocess.Popen(["node", program, *options], cwd=directory, stdout=output, stderr=output)
        try:
            wait_for_port(port, process, seconds=60)
            container = Container(endpoint=f"http://127.0.0.1:{port}/{ACCOUNT}", name="files")
            container.request("PUT", {"restype": "container"})
            yield container
        finally:
            end(process)
