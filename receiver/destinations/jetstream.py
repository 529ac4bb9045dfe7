"""The settings by which a JetStream stream may lose messages that it has acknowledged; pure."""

import re
from collections.abc import Sequence

from nats.js.api import ConsumerInfo, DiscardPolicy, RetentionPolicy, StorageType, StreamConfig, StreamInfo

from receiver.core.retry import DAY


def loss_warning(
    info: StreamInfo, subject: str, consumers: Sequence[ConsumerInfo] | None = None
) -> str | None:
    """Return all settings by which a stream may lose events of a subject; None if there are none.

    `consumers` are those of the stream; None if the user has no permission to list them.
    """
    config, problems = info.config, []
    if config.retention == RetentionPolicy.INTEREST and not _has_consumer(info, subject, consumers):
        problems.append(
            f"the stream {config.name} has the retention `interest` and no consumer takes the subject, so it "
            "acknowledges each event and keeps none: make the consumer first, or set the retention `limits`"
        )
    if config.storage == StorageType.MEMORY:
        problems.append("the stream is in memory: make one with file storage")
    if dropped := _list_limits(config):
        problems.append(f"the stream keeps {', '.join(dropped)}, even if they are unread")
    if config.storage != StorageType.MEMORY and (config.num_replicas or 1) == 1:
        problems.append(
            "the stream has one replica: a power cut may lose minutes, unless sync_interval is always"
        )
    return "; ".join(problems) or None


def _list_limits(config: StreamConfig) -> list[str]:
    """Return the limits beyond which a stream drops messages that it has acknowledged."""
    rejects = config.discard == DiscardPolicy.NEW
    limits = [
        ("max_msgs", "the last {} events only", config.max_msgs, not rejects),
        ("max_bytes", "the last {} bytes only", config.max_bytes, not rejects),
        (
            "max_msgs_per_subject",
            "the last {} events only",
            config.max_msgs_per_subject,
            not (rejects and config.discard_new_per_subject),
        ),
        # An age of days is usual, and leaves consumers enough time to read.
        ("max_age", "events for {:g} s only", config.max_age, (config.max_age or 0) < DAY),
    ]
    return [
        f"{text.format(most)} ({name})" for name, text, most, drops in limits if drops and most and most > 0
    ]


def _has_consumer(info: StreamInfo, subject: str, consumers: Sequence[ConsumerInfo] | None) -> bool:
    if consumers is None:
        return info.state.consumer_count > 0
    return any(
        _matches(subject, pattern)
        for each in consumers
        for pattern in each.config.filter_subjects or [each.config.filter_subject or ">"]
    )


def _matches(subject: str, pattern: str) -> bool:
    """Return whether a subject matches a pattern: `*` is one token, and `>` at the end is one or more."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+").replace(">", ".+"), subject) is not None
