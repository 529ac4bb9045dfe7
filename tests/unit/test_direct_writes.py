"""Writing past the page cache: every byte is in the file, with or without support by the file system."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from receiver.media.storage.direct import DirectWriter

MIB: Final = 1024 * 1024
DATA: Final = (bytes(range(251)) * 20_000)[: 4 * MIB + 12_345]


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """Open an empty file."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    yield descriptor
    os.close(descriptor)


def write(descriptor: int, data: bytes, step: int) -> bytes:
    """Write `data` in pieces, and return the content of the file."""
    writer = DirectWriter(descriptor)
    for at in range(0, len(data), step):
        writer.write(data[at : at + step])
    writer.end()
    return os.pread(descriptor, len(data) + 1, 0)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB, len(DATA)])
@pytest.mark.parametrize("step", [4096, 300_001, MIB, 3 * MIB])
def test_every_byte_is_written(descriptor: int, size: int, step: int) -> None:
    """D10: the file has all bytes in order, whatever the pieces are."""
    assert write(descriptor, DATA[:size], step) == DATA[:size]


def test_a_file_system_may_reject_the_flag(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """D10: if the file system has no such writes, the file is written through the cache."""

    def reject(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("fcntl.fcntl", reject)
    assert write(descriptor, DATA, MIB) == DATA


def test_a_file_system_may_reject_a_write(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """D10: if a write past the cache is rejected, half-way too, the rest goes through the cache."""
    plain = os.write
    calls = 0

    def partly(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            return plain(descriptor, data[:1000])
        if calls == 4:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, data)

    monkeypatch.setattr("os.write", partly)
    # The partial write is no whole page, so it needs a descriptor without the flag.
    monkeypatch.setattr("receiver.media.storage.direct._FLAG", os.O_APPEND)
    assert write(descriptor, DATA, MIB) == DATA


def test_other_errors_pass(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """D16: a full disk is no missing support."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match="No space"):
        write(descriptor, DATA, MIB)
