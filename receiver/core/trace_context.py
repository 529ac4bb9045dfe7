"""W3C Trace Context: the headers `traceparent` and `tracestate`, and ids of spans that can be computed."""

import hashlib
import re
from collections.abc import Sequence
from typing import Final, NamedTuple, Self
from uuid import UUID

MAX_STATE_LENGTH: Final = 512
"""The length of `tracestate` that everyone has to pass on; longer ones lose members."""
MAX_STATE_MEMBERS: Final = 32
SAMPLED: Final = 0x01
RANDOM: Final = 0x02
"""The flag of a trace id whose last seven bytes are random."""

_LONG_MEMBER: Final = 128
_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY: Final = r"[a-z0-9][a-z0-9_*/@-]{0,255}"
_MEMBER: Final = re.compile(rf"({_KEY})=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")


class TraceContext(NamedTuple):
    """The place of a span in its trace."""

    trace_id: int
    span_id: int
    flags: int
    state: str | None = None
    """The members of `tracestate`, with commas between them."""

    @classmethod
    def parse(cls, parent: str | None, state: str | None = None) -> Self | None:
        """Read the two headers; None without a valid `traceparent`. An invalid `tracestate` is dropped."""
        match = _PARENT.fullmatch(parent or "")
        if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
            return None
        trace_id, span_id, flags = (int(match[number], 16) for number in (2, 3, 4))
        if not trace_id or not span_id:
            return None
        return cls(trace_id, span_id, flags & (SAMPLED | RANDOM), _parse_state(state or ""))

    @classmethod
    def read(cls, parents: Sequence[str], states: Sequence[str]) -> Self | None:
        """Read the headers of a request; two `traceparent` are as good as none."""
        return cls.parse(parents[0], ",".join(states)) if len(parents) == 1 else None

    @property
    def parent(self) -> str:
        """The value of `traceparent`."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"


def computed_ids(of: UUID) -> tuple[int, int]:
    """Return the ids of the trace that begins with a job or an event, and of its span in any trace.

    Each process computes the same ones, so none has to be stored. The UUID itself would not do as a trace's
    id: samplers compare the last eight bytes with a bound, and in a UUID two bits of these never change.
    """
    digest = hashlib.blake2b(of.bytes, digest_size=24, person=b"clipia-receiver").digest()
    return int.from_bytes(digest[:16]), int.from_bytes(digest[16:])


def _parse_state(text: str) -> str | None:
    members = [member for each in text.split(",") if (member := each.strip(" \t"))]
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = {match[1] for match in matches if match is not None}
    if len(keys) < len(members) or len(members) > MAX_STATE_MEMBERS:
        return None
    if len(",".join(members)) > MAX_STATE_LENGTH:
        members = [member for member in members if len(member) <= _LONG_MEMBER]
    while len(",".join(members)) > MAX_STATE_LENGTH:
        members.pop()
    return ",".join(members) or None
