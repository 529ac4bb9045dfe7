"""All metrics. The docs have a table of them; names and labels are public."""

from prometheus_client import Counter, Gauge, Histogram

WEBHOOKS = Counter("receiver_webhooks", "Authentic webhooks by outcome.", ["source", "outcome"])
REJECTIONS = Counter(
    "receiver_rejections", "Requests refused at the callback, by reason.", ["source", "reason"]
)
REQUESTS_SHED = Counter(
    "receiver_requests_shed",
    "Requests refused and connections closed because RECEIVER_MAX_BUFFERED_BYTES was used up.",
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
DELIVERIES = Counter("receiver_deliveries", "Tries at deliveries, by outcome.", ["destination", "outcome"])
CIRCUIT_OPEN = Gauge(
    "receiver_circuit_open",
    "1 while a destination is left alone but for probes.",
    ["destination"],
    multiprocess_mode="livemax",
)
DEAD_LETTERS = Gauge(
    "receiver_dead_letters",
    "Deliveries that were given up and wait for somebody, by destination.",
    ["destination"],
    multiprocess_mode="mostrecent",
)
UNRECOGNIZED = Gauge(
    "receiver_unrecognized_events",
    "Signed bodies that were not recognized; `receiver events recover` takes up those that are recoverable.",
    ["recoverable"],
    multiprocess_mode="mostrecent",
)
MEDIA_FILES = Counter(
    "receiver_media_files",
    "Tries at media downloads, by outcome; `flagged` are files that were stored with a warning.",
    ["outcome"],
)
MEDIA_SKIPPED = Counter(
    "receiver_media_skipped", "URLs in outputs that are not fetched, by the reason.", ["reason"]
)
MEDIA_BYTES = Counter("receiver_media_bytes", "Bytes of media stored.")
SUBMISSIONS = Counter("receiver_submissions", "Tries at submitting jobs, by outcome.", ["outcome"])
POLLS = Counter("receiver_polls", "Questions for the state of a job, by outcome.", ["outcome"])
SUBMISSIONS_PAUSED = Gauge(
    "receiver_submissions_paused",
    "1 while no job is accepted: Clipia refuses the account, or submissions are frozen.",
    multiprocess_mode="mostrecent",
)
JOBS_REFUSED = Gauge(
    "receiver_jobs_refused",
    "Jobs that Clipia refuses for their price, their model or the key's scopes; they are tried again.",
    multiprocess_mode="mostrecent",
)
BACKLOG = Gauge(
    "receiver_backlog",
    "Rows of work that are not finished, by lane.",
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
    "receiver_log_records_dropped", "Log records dropped because their reader was too slow."
)
