"""Inspection of a body as it streams by: its size, its digests, and whether it is cut or damaged."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from receiver.errors import MediaBlocked, MediaDoubtful
from receiver.media.container_formats import DamagedFile, Follower, Walk
from receiver.media.storage.base import ahead, blocks

# A thread examines blocks of this size: the SHA-256 of a MiB would hold up the event loop for 0.6 ms.
_BLOCK_BYTES = 512 * 1024


@dataclass(kw_only=True)
class Inspection:
    """One body of at most `max_bytes`, compared with the `stated` digests and with the end of its `walk`.

    `is_framed` tells whether HTTP marks the end of the body, by a length or by chunks. A body in doubt passes
    if it has the digest `seen_sha256`, because then the host has sent the same bytes twice, or
    with `keep_doubtful`; `warning` then names the doubt.
    """

    max_bytes: int
    stated: Mapping[str, bytes]
    walk: Walk
    min_bytes: int = 1
    is_framed: bool = True
    seen_sha256: str | None = None
    keep_doubtful: bool = False
    size: int = field(default=0, init=False)
    warning: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._sha256 = hashlib.sha256()
        others = self.stated.keys() - {"sha256"}
        self._others = {name: hashlib.new(name, usedforsecurity=False) for name in others}
        self._follower = Follower(self.walk)
        self._damage: str | None = None

    @property
    def sha256(self) -> str:
        """The digest of the bytes so far, in hex."""
        return self._sha256.hexdigest()

    def feed(self, part: bytes) -> None:
        """Add the next part. Raises MediaBlocked if the body exceeds its limit."""
        self._count(part)
        self._examine(part)

    def _count(self, part: bytes) -> None:
        self.size += len(part)
        if self.size > self.max_bytes:
            raise MediaBlocked(f"The file is larger than {self.max_bytes} bytes", reason="too_large")

    def _examine(self, part: bytes) -> None:
        self._sha256.update(part)
        for digest in self._others.values():
            digest.update(part)
        if self._damage is None:
            try:
                self._follower.feed(part)
            except DamagedFile as error:
                self._damage = f"The file is damaged: {error}"

    async def stream(self, head: bytes, parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Feed and yield `head` and `parts`, the latter joined to blocks.

        A thread examines a large block while the caller stores it and the next one comes. `finish` runs
        before the iteration ends, so that the storage discards a body that it rejects.
        """
        self.feed(head)
        yield head
        async with aclosing(ahead(blocks(self._counted(parts), _BLOCK_BYTES))) as joined:
            async for block in joined:
                if len(block) < _BLOCK_BYTES:
                    self._examine(block)
                    yield block
                    continue
                examining = asyncio.ensure_future(asyncio.to_thread(self._examine, block))
                try:
                    yield block
                finally:
                    await examining
        self.finish()

    async def _counted(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Check the size of each part as it comes: a block may come much later."""
        async for part in parts:
            self._count(part)
            yield part

    def finish(self) -> None:
        """Judge the whole body. Raises MediaDoubtful if it is in doubt and may not pass."""
        if doubt := self.find_doubt():
            is_seen = doubt.sha256 is not None and doubt.sha256 == self.seen_sha256
            if not is_seen and not self.keep_doubtful:
                raise doubt
            self.warning = str(doubt)

    def find_doubt(self) -> MediaDoubtful | None:
        """Return the first contradiction in a body that has come to its end, if there is one."""
        if self._damage is not None:
            return self._doubt(self._damage, "damaged")
        if self.size < self.min_bytes or not self._follower.is_complete:
            # Without framing a connection may break twice at the same place: the same bytes prove too little.
            return self._doubt(
                f"The file ends early, after {self.size} bytes", "truncated", may_repeat=self.is_framed
            )
        if not self.is_framed and not self._follower.ends_here:
            return self._doubt(
                "HTTP announces neither a length nor chunks: a broken connection would look like the end",
                "length",
            )
        found = {"sha256": self._sha256} | self._others
        for name, digest in self.stated.items():
            if found[name].digest() != digest:
                return self._doubt(f"The file does not match the {name} that came with it", "digest")
        return None

    def _doubt(self, message: str, reason: str, *, may_repeat: bool = True) -> MediaDoubtful:
        return MediaDoubtful(message, reason=reason, sha256=self.sha256 if may_repeat else None)
