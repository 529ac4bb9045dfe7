"""Packages from npm, in a folder of their own."""

import shutil
import subprocess
import uuid
from pathlib import Path

from support.servers import missing


def install(cache: Path, *packages: str) -> Path:
    """Return the folder of packages such as `pg@8.23.1`, which npm installs into `cache` once."""
    folder = cache / "+".join(packages)
    if folder.exists():
        return folder
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        missing("npm", "apt-get install nodejs npm")
        raise AssertionError("unreachable")
    new = cache / uuid.uuid4().hex
    options = ["--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
    options += ["--prefer-offline", "--fetch-retries=1", "--loglevel=error"]
    command = [npm, "install", "--prefix", str(new), *options, *packages]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if result.returncode:
            missing(" ".join(packages), f"npm cannot install it: {result.stderr}")
        # As a whole: another run of the tests may install it at the same time.
        if not folder.exists():
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder
