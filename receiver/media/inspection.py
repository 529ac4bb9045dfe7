"""Counts, hashes and follows a body as it streams by, and says at its end whether it was whole."""

import hashlib
from collections.abc import Mapping

from receiver.errors import MediaBlocked, MediaUnavailable
from receiver.media.containers import Damaged, Follower, Walk


class Inspection:
    """One body of at most `max_bytes` that must match the `stated` digests and end where its `walk` ends."""

    def __init__(self, *, max_bytes: int, stated: Mapping[str, bytes], walk: Walk) -> None:
        self.size = 0
        self._max_bytes = max_bytes
        self._stated = stated
        self._sha256 = hashlib.sha256()
        self._others = {name: hashlib.new(name, usedforsecurity=False) for name in stated if name != "sha256"}
        self._follower = Follower(walk)

    @property
    def sha256(self) -> str:
        """The digest of what came so far, in hex."""
        return self._sha256.hexdigest()

    def feed(self, part: bytes) -> None:
        """Take in the next part. Raises MediaBlocked beyond the cap, MediaUnavailable for damage."""
        self.size += len(part)
        if self.size > self._max_bytes:
            raise MediaBlocked(f"The file is larger than {self._max_bytes} bytes", reason="too_large")
        self._sha256.update(part)
        for digest in self._others.values():
            digest.update(part)
        try:
            self._follower.feed(part)
        except Damaged as error:
            raise MediaUnavailable(f"The file is damaged: {error}", reason="damaged") from error

    def finish(self) -> None:
        """Raise MediaUnavailable unless the file is complete."""
        if not self._follower.is_complete:
            raise MediaUnavailable(f"The file ends early, after {self.size} bytes", reason="truncated")
        found = {"sha256": self._sha256} | self._others
        for name, digest in self._stated.items():
            if found[name].digest() != digest:
                raise MediaUnavailable(
                    f"The file does not match the {name} that came with it", reason="digest"
                )
