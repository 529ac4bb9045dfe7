"""The Prometheus metrics. Their names and labels are public; docs/metrics.md has a table of them."""

import re
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ROWS: Final = CollectorRegistry()
"""The gauges that count rows of the database: they are shown once they have been read.

In the registry of the others a gauge without a label would be 0 until then, which would be untrue.
"""
MAX_MODELS: Final = 100
"""Models with a label of their own; Clipia offers fewer."""
OTHER: Final = "other"
"""The label of a model without one of its own."""

_PLAIN_MODEL: Final = re.compile(r"[a-z0-9][a-z0-9._/-]{0,63}")
_models: set[str] = set()

WEBHOOKS = Counter("receiver_webhooks", "Authentic webhooks by outcome.", ["source", "outcome"])
REJECTIONS = Counter(
    "receiver_rejections", "Requests rejected at the callback, by reason.", ["source", "reason"]
)
REJECTIONS_KEPT = Counter(
    "receiver_rejections_kept",
    "Rejected requests by whether they were kept as evidence, and if not, for which limit or failure.",
    ["outcome"],
)
REQUESTS_SHED = Counter(
    "receiver_requests_shed",
    "Requests rejected and connections closed because RECEIVER_MAX_BUFFERED_BYTES was used up.",
)
SECRETS_USED = Counter(
    "receiver_signatures_verified",
    "Signatures verified, by the id of the secret that matched.",
    ["source", "secret_id"],
)
ACK_SECONDS = Histogram(
    "receiver_ack_seconds",
    "From the first byte of the request seen by the application to the answer.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 8, 10),
)
DELIVERIES = Counter("receiver_deliveries", "Attempts at deliveries, by outcome.", ["destination", "outcome"])
DELIVERY_SECONDS = Histogram(
    "receiver_delivery_seconds",
    "From the receipt of an event to its confirmed delivery; replays do not count.",
    ["destination"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600, 21600, 86400),
)
CIRCUIT_OPEN = Gauge(
    "receiver_circuit_open",
    "1 while the destination's circuit breaker is open: it gets probes only.",
    ["destination"],
)
MEDIA_FILES = Counter(
    "receiver_media_files",
    "Attempts at media downloads, by outcome; `flagged` files were stored with a warning.",
    ["outcome"],
)
MEDIA_SKIPPED = Counter(
    "receiver_media_skipped", "URLs in outputs that are not downloaded, by reason.", ["reason"]
)
MEDIA_BYTES = Counter("receiver_media_bytes", "Bytes of media stored.")
SUBMISSIONS = Counter("receiver_submissions", "Attempts to submit a job, by outcome.", ["outcome"])
POLLS = Counter("receiver_polls", "Polls of a job's state, by outcome.", ["outcome"])
GENERATIONS = Counter(
    "receiver_generations", "Results by model: completed, failed or canceled.", ["model", "outcome"]
)
GENERATION_SECONDS = Histogram(
    "receiver_generation_seconds",
    "From the first submission of a job to the record of its result.",
    ["model"],
    buckets=(0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600),
)
CREDITS = Counter("receiver_credits", "Credits that completed results name, by model.", ["model"])
LOGS_DROPPED = Counter(
    "receiver_log_records_dropped", "Log records dropped because the reader of standard error was too slow."
)
RELOAD_FAILED = Gauge(
    "receiver_settings_reload_failed",
    "1 if the last SIGHUP changed nothing, because the settings are not valid; otherwise 0.",
)
DATABASE_UP = Gauge("receiver_database_up", "1 if the database answered this scrape in time, otherwise 0.")
DEAD_LETTERS = Gauge(
    "receiver_dead_letters",
    "Deliveries that were given up and wait for the operator, by destination.",
    ["destination"],
    registry=ROWS,
)
PAUSED = Gauge(
    "receiver_destination_paused",
    "1 while an operator has paused the destination: events wait.",
    ["destination"],
    registry=ROWS,
)
UNRECOGNIZED = Gauge(
    "receiver_unrecognized_events",
    "Unrecognized events; `receiver events recover` recovers the recoverable ones.",
    ["recoverable"],
    registry=ROWS,
)
SUBMISSIONS_PAUSED = Gauge(
    "receiver_submissions_paused",
    "1 while no job is accepted: Clipia refuses the account, or submissions are frozen.",
    registry=ROWS,
)
JOBS_REFUSED = Gauge(
    "receiver_jobs_refused",
    "Jobs that Clipia refuses for their price, their model or the key's scopes; they are retried.",
    registry=ROWS,
)
RETENTION_AGE = Gauge(
    "receiver_retention_age_seconds",
    "Seconds since a run of retention succeeded; 0 without RECEIVER_RETENTION_DAYS and before the first one.",
    registry=ROWS,
)
BACKLOG = Gauge("receiver_backlog", "Unfinished rows, by lane.", ["lane"], registry=ROWS)
BACKLOG_OLDEST = Gauge(
    "receiver_backlog_oldest_seconds", "Age of the oldest unfinished row, by lane.", ["lane"], registry=ROWS
)

# From the start, because `increase` does not see the first count of a series that appears with it.
for _outcome in ("accepted", "refused", "refused_for_now", "unsure"):
    SUBMISSIONS.labels(_outcome)
POLLS.labels("given_up")
for _outcome in ("stored", "gone", "blocked", "not_media"):
    MEDIA_FILES.labels(_outcome)


def show_source(source: str) -> None:
    """Show the series of a source that alerts go by, from the start, for the same reason."""
    for outcome in ("accepted", "unavailable"):
        WEBHOOKS.labels(source, outcome)
    REJECTIONS.labels(source, "mismatch")


def model_label(model: str | None) -> str:
    """Return the label of a model; `other` if it is no plain name, or after the first `MAX_MODELS`.

    The names come from Clipia: from signed events, and from jobs that Clipia has accepted. The catalogue
    would bound them, too, but a receiver without an API key has none.
    """
    if model is None or _PLAIN_MODEL.fullmatch(model) is None:
        return OTHER
    if model not in _models:
        if len(_models) >= MAX_MODELS:
            return OTHER
        _models.add(model)
    return model
