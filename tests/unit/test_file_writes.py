"""Private files, whole writes and durable folders."""

import os
from pathlib import Path

import pytest

from receiver.private_files import make_folder, open_private, write_all


@pytest.mark.parametrize("most", [1, 3, 100])
def test_write_all_goes_on_after_a_short_write(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that writes a part only is followed by another one for the rest."""
    write, path = os.write, tmp_path / "file"
    descriptor = open_private(str(path), os.O_WRONLY | os.O_CREAT)
    monkeypatch.setattr(os, "write", lambda target, data: write(target, data[:most]))
    try:
        write_all(descriptor, b"a whole line\n")
    finally:
        os.close(descriptor)
    assert path.read_bytes() == b"a whole line\n"


def name_of(descriptor: int) -> Path:
    """Return the path of an open file or folder."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def test_every_parent_of_a_new_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent of each folder that was made is flushed to the disk; a second call flushes none."""
    flushed: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(name_of(descriptor)))
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
