"""Counts, hashes and follows a body as it streams by, and says at its end what speaks against it."""

import hashlib
from collections.abc import Mapping

from receiver.errors import MediaBlocked, MediaDoubtful
from receiver.media.containers import Damaged, Follower, Walk


class Inspection:
    """One body of at most `max_bytes`, against the `stated` digests and the end of its `walk`.

    `is_framed` tells whether HTTP says where the body ends, by a length or by chunks.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        stated: Mapping[str, bytes],
        walk: Walk,
        min_bytes: int = 1,
        is_framed: bool = True,
    ) -> None:
        self.size = 0
        self._max_bytes = max_bytes
        self._min_bytes = min_bytes
        self._is_framed = is_framed
        self._stated = stated
        self._sha256 = hashlib.sha256()
        self._others = {name: hashlib.new(name, usedforsecurity=False) for name in stated if name != "sha256"}
        self._follower = Follower(walk)
        self._damage: str | None = None

    @property
    def sha256(self) -> str:
        """The digest of what came so far, in hex."""
        return self._sha256.hexdigest()

    def feed(self, part: bytes) -> None:
        """Take in the next part. Raises MediaBlocked beyond the cap."""
        self.size += len(part)
        if self.size > self._max_bytes:
            raise MediaBlocked(f"The file is larger than {self._max_bytes} bytes", reason="too_large")
        self._sha256.update(part)
        for digest in self._others.values():
            digest.update(part)
        if self._damage is None:
            try:
                self._follower.feed(part)
            except Damaged as error:
                self._damage = f"The file is damaged: {error}"

    def find_doubt(self) -> MediaDoubtful | None:
        """Return what contradicts a body that has come to its end; None if nothing does."""
        if self._damage is not None:
            return self._doubt(self._damage, "damaged")
        if self.size < self._min_bytes or not self._follower.is_complete:
            # Without framing a broken connection may cut twice at the same place.
            return self._doubt(
                f"The file ends early, after {self.size} bytes", "truncated", settles=self._is_framed
            )
        if not self._is_framed and not self._follower.ends_here:
            return self._doubt(
                "Neither a length nor chunks: a broken connection would look like the end", "length"
            )
        found = {"sha256": self._sha256} | self._others
        for name, digest in self._stated.items():
            if found[name].digest() != digest:
                return self._doubt(f"The file does not match the {name} that came with it", "digest")
        return None

    def _doubt(self, message: str, reason: str, *, settles: bool = True) -> MediaDoubtful:
        return MediaDoubtful(message, reason=reason, sha256=self.sha256 if settles else None)
