"""Inspection of a body as it streams by: its size, its digests, and whether it is cut or damaged."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field

from receiver.errors import MediaBlocked, MediaDoubtful
from receiver.media.container_formats import DamagedFile, Follower, Walk


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
        self.size += len(part)
        if self.size > self.max_bytes:
            raise MediaBlocked(f"The file is larger than {self.max_bytes} bytes", reason="too_large")
        self._sha256.update(part)
        for digest in self._others.values():
            digest.update(part)
        if self._damage is None:
            try:
                self._follower.feed(part)
            except DamagedFile as error:
                self._damage = f"The file is damaged: {error}"

    async def stream(self, head: bytes, parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Feed and yield `head` and `parts`.

        `finish` runs before the iteration ends, so that the storage discards a body that it rejects.
        """
        self.feed(head)
        yield head
        async for part in parts:
            self.feed(part)
            yield part
        self.finish()

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
