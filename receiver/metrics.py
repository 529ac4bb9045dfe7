"""The Prometheus metrics. Their names and labels are public; the README has a table of them."""

from prometheus_client import Counter, Gauge, Histogram

WEBHOOKS = Counter("receiver_webhooks", "Authentic webhooks by outcome.", ["source", "outcome"])
REJECTIONS = Counter(
    "receiver_rejections", "Requests rejected at the callback, by reason.", ["source", "reason"]
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
CIRCUIT_OPEN = Gauge(
    "receiver_circuit_open",
    "1 while the destination's circuit breaker is open: it gets probes only.",
    ["destination"],
    multiprocess_mode="livemax",
)
DEAD_LETTERS = Gauge(
    "receiver_dead_letters",
    "Deliveries that were given up and wait for the operator, by destination.",
    ["destination"],
    multiprocess_mode="mostrecent",
)
UNRECOGNIZED = Gauge(
    "receiver_unrecognized_events",
    "Unrecognized events; `receiver events recover` recovers the recoverable ones.",
    ["recoverable"],
    multiprocess_mode="mostrecent",
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
SUBMISSIONS_PAUSED = Gauge(
    "receiver_submissions_paused",
    "1 while no job is accepted: Clipia refuses the account, or submissions are frozen.",
    multiprocess_mode="mostrecent",
)
JOBS_REFUSED = Gauge(
    "receiver_jobs_refused",
    "Jobs that Clipia refuses for their price, their model or the key's scopes; they are retried.",
    multiprocess_mode="mostrecent",
)
BACKLOG = Gauge(
    "receiver_backlog",
    "Unfinished rows, by lane.",
    ["lane"],
    multiprocess_mode="mostrecent",
)
BACKLOG_OLDEST = Gauge(
    "receiver_backlog_oldest_seconds",
    "Age of the oldest unfinished row, by lane.",
    ["lane"],
    multiprocess_mode="mostrecent",
)
LOGS_DROPPED = Counter(
    "receiver_log_records_dropped", "Log records dropped because the reader of standard error was too slow."
)
