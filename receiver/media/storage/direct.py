"""Writing past the page cache of the kernel.

Through the cache, a GiB takes up to a second of the kernel's time, as much as the network and the SHA-256
together, the flush at its end takes another half, and the pages of the database are dropped for it.
"""

import errno
import fcntl
import mmap
import os
from typing import Final

_BYTES: Final = 1024 * 1024
# macOS has no such flag.
_FLAG: Final = getattr(os, "O_DIRECT", 0)


class DirectWriter:
    """Appends to an empty file. Without support by the file system it writes through the cache."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # The kernel reads the memory without a copy, and takes only whole pages of it.
        self._memory = memoryview(mmap.mmap(-1, _BYTES))
        self._filled = 0
        self._is_direct = self._switch(_FLAG)

    def write(self, data: bytes) -> None:
        """Write whole MiBs, and keep the rest for the next call."""
        rest = memoryview(data)
        while rest:
            size = min(len(rest), _BYTES - self._filled)
            self._memory[self._filled : self._filled + size] = rest[:size]
            rest = rest[size:]
            self._filled += size
            if self._filled == _BYTES:
                self._empty()

    def end(self) -> None:
        """Write the kept bytes, which are no whole pages, through the cache. The caller flushes it."""
        self._turn_off()
        self._empty()

    def _empty(self) -> None:
        rest = self._memory[: self._filled]
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                # The file system wants larger pages, or it has written a part of one because it is full.
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._turn_off()
        self._filled = 0

    def _turn_off(self) -> None:
        if self._is_direct:
            self._is_direct = False
            self._switch(0)

    def _switch(self, flag: int) -> bool:
        try:
            others = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_FLAG
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, others | flag)
        except OSError:
            return False
        return bool(flag)
