"""How a JetStream stream may lose what it has acknowledged, as far as its settings show; pure."""

import re
from collections.abc import Sequence

from nats.js.api import ConsumerInfo, DiscardPolicy, RetentionPolicy, StorageType, StreamInfo


def describe_losses(
    info: StreamInfo, subject: str, consumers: Sequence[ConsumerInfo] | None = None
) -> str | None:
    """Return how a stream may lose events of a subject, and what to do; None if nothing shows.

    `consumers` are those of the stream; None if the user may not ask for them.
    """
    config = info.config
    if config.retention == RetentionPolicy.INTEREST and not _is_wanted(info, subject, consumers):
        return (
            f"the stream {config.name} has the retention `interest` and no consumer takes the subject, so it "
            "acknowledges each event and keeps none: make the consumer first, or take the retention `limits`"
        )
    if config.storage == StorageType.MEMORY:
        return "the stream is kept in memory: make one with file storage"
    most = config.max_msgs_per_subject or 0
    if most > 0 and config.discard != DiscardPolicy.NEW:
        return f"the stream keeps the last {most} events only, read or not: see its max_msgs_per_subject"
    if (config.num_replicas or 1) == 1:
        return "a power cut may lose minutes: the stream has one replica; or is sync_interval always there?"
    return None


def _is_wanted(info: StreamInfo, subject: str, consumers: Sequence[ConsumerInfo] | None) -> bool:
    if consumers is None:
        return info.state.consumer_count > 0
    return any(
        _fits(subject, pattern)
        for each in consumers
        for pattern in each.config.filter_subjects or [each.config.filter_subject or ">"]
    )


def _fits(subject: str, pattern: str) -> bool:
    """Return whether a subject fits a pattern: `*` is one token, and `>` at the end is one or more."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+").replace(">", ".+"), subject) is not None
