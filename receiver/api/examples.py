"""Examples of the API's specification; a test checks each one against the schema of its answer."""

from typing import Any, Final

_AT: Final = "2026-01-31T12:00:00Z"
_JOB_ID: Final = "01a1fdfe-da8d-7f2d-8a66-991a87796372"
_EVENT_ID: Final = "b3ab93bc-23a9-5fe2-a63c-05a4fe0af24c"
_DELIVERY_ID: Final = "01a1fe1f-4d6d-74d7-af73-a0b5ac94520e"
_FILE_ID: Final = "01a1fe1f-4d6d-74d7-af73-a0b5ac94520f"
_REQUEST_ID: Final = "c7b6521b-55d1-46c4-8952-f1af51482c78"
_SHA256: Final = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
_MODEL: Final = "nano-banana-2"
_URL: Final = "https://media.clipia.ai/a.png"
_URI: Final = "file:///data/media/c7b6521b/00-original.png"
_LINK: Final = f"https://receiver.internal/v1/media/{_FILE_ID}"
_ATTEMPT: Final = {
    "number": 1,
    "started_at": _AT,
    "duration_ms": 7,
    "outcome": "succeeded",
    "error": None,
}
_LOGGED: Final = {"seq": 1, **_ATTEMPT, "answer": None}
_EVENT_HEAD: Final = {
    "seq": 1,
    "id": _EVENT_ID,
    "source": "clipia",
    "request_id": _REQUEST_ID,
    "origin": "webhook",
    "state": "ready",
    "reason": None,
    "status": "OK",
    "model": _MODEL,
    "cost": 12,
    "body_sha256": _SHA256,
    "received_at": _AT,
    "job_id": _JOB_ID,
}
_WORK: Final = {
    "state": "delivered",
    "attempts": 1,
    "next_attempt_at": None,
    "error": None,
    "created_at": _AT,
    "finished_at": _AT,
    "restarted_at": None,
}
_DELIVERY: Final = {"id": _DELIVERY_ID, "destination": "orders", "replay_id": None, **_WORK}
_FILE: Final = {
    "id": _FILE_ID,
    "position": 0,
    "variant": "original",
    "kind": "image",
    "url": _URL,
    "field": "/images/0/url",
    **_WORK,
    "state": "stored",
    "size": 1024,
    "sha256": _SHA256,
    "content_type": "image/png",
    "storage_key": "c7b6521b/00-original.png",
    "uri": _URI,
    "warning": None,
}

EVENT_SUMMARY: Final[dict[str, Any]] = {
    **_EVENT_HEAD,
    "media": {"stored": 1},
    "deliveries": {"delivered": 1},
}
RECEIPT: Final[dict[str, Any]] = {
    "seq": 0,
    "webhook_id": "wh_1",
    "secret_id": "3f2a9c1d",
    "signed_at": _AT,
    "received_at": _AT,
    "body_sha256": _SHA256,
    "outcome": "accepted",
    "body": None,
    "repeated": 0,
}
EVENT: Final[dict[str, Any]] = {
    **_EVENT_HEAD,
    "body": {"request_id": _REQUEST_ID, "status": "OK", "payload": {"images": [{"url": _URL}]}},
    "receipts": [RECEIPT],
    "receipts_total": 1,
    "media": [{**_FILE, "attempt_log": [_LOGGED], "link": _LINK}],
    "deliveries": [{**_DELIVERY, "attempt_log": [_LOGGED]}],
}
ERASED: Final[dict[str, Any]] = {
    "id": _EVENT_ID,
    "request_id": _REQUEST_ID,
    "files": 1,
    "files_elsewhere": [],
}
DELIVERY: Final[dict[str, Any]] = {
    **_DELIVERY,
    "state": "dead",
    "error": "orders answered 422",
    "event_id": _EVENT_ID,
    "request_id": _REQUEST_ID,
    "status": "OK",
    "model": _MODEL,
}
RESTARTED_MANY: Final[dict[str, Any]] = {
    "restarted": {"orders": 312},
    "not_configured": [],
    "more": False,
    "began": _AT,
}
REDIRECTED: Final[dict[str, Any]] = {
    "moved": 0,
    "discarded": 312,
    "replays": 1,
    "under_way": 0,
    "under_way_seconds": 0.0,
    "still_in": [],
    "more": False,
}
SHOWN_DELIVERY: Final[dict[str, Any]] = {
    **DELIVERY,
    "attempt_log": [
        {
            **_LOGGED,
            "outcome": "failed",
            "error": "PublishRejected: https://orders.example answered 422",
            "answer": '{"error": "unknown order"}',
        }
    ],
}
FAILURES: Final[dict[str, Any]] = {
    "destination": "orders",
    "state": "dead",
    "cause": "answered 422",
    "count": 312,
    "first": _AT,
    "last": _AT,
    "example": _DELIVERY_ID,
}
MESSAGE: Final[dict[str, Any]] = {
    "specversion": "1.0",
    "id": _EVENT_ID,
    "source": "/clipia/webhook/clipia",
    "type": "ai.clipia.generation.completed",
    "subject": _REQUEST_ID,
    "time": _AT,
    "datacontenttype": "application/json",
    "deliveryid": _DELIVERY_ID,
    "attempt": 1,
    "data": {"request_id": _REQUEST_ID, "status": "OK"},
}
JOB_ORDER: Final[dict[str, Any]] = {
    "model": _MODEL,
    "input": {"prompt": "a cat"},
    "metadata": {"order": "4711"},
    "max_cost": 20,
    "wait": 30,
}
_JOB_EVENT: Final = {
    "id": _EVENT_ID,
    "status": "OK",
    "state": "ready",
    "origin": "webhook",
    "received_at": _AT,
}
JOB: Final[dict[str, Any]] = {
    "id": _JOB_ID,
    "state": "completed",
    "caller": "shop",
    "idempotency_key": "order-4711/hero",
    "model": _MODEL,
    "input": {"prompt": "a cat"},
    "metadata": {"order": "4711"},
    "max_cost": 20,
    "request_id": _REQUEST_ID,
    "progress": 100,
    "cost": 12,
    "charged": 12,
    "warnings": [],
    "error": None,
    "created_at": _AT,
    "submitted_at": _AT,
    "updated_at": _AT,
    "finished_at": _AT,
    "next_attempt_at": None,
    "has_webhook": True,
    "live": True,
    "event": {
        **_JOB_EVENT,
        "media": [
            {
                "id": _FILE_ID,
                "kind": "image",
                "variant": "original",
                "url": _URL,
                "field": "/images/0/url",
                "state": "stored",
                "uri": _URI,
                "size": 1024,
                "sha256": _SHA256,
                "content_type": "image/png",
                "error": None,
                "warning": None,
            }
        ],
        "deliveries": [
            {
                "id": _DELIVERY_ID,
                "destination": "orders",
                "state": "delivered",
                "attempts": 1,
                "error": None,
                "finished_at": _AT,
            }
        ],
    },
    "attempts": [_ATTEMPT],
}
LISTED_JOB: Final[dict[str, Any]] = {
    **JOB,
    "event": {**_JOB_EVENT, "media": [], "deliveries": []},
    "attempts": [],
}
MODEL: Final[dict[str, Any]] = {
    "slug": _MODEL,
    "name": "Nano Banana 2",
    "type": "image",
    "pricing": {"credits": 12},
}
ACCOUNT: Final[dict[str, Any]] = {
    "account_id": "acc_1",
    "balance": {"credits": 4200},
    "usage_30d": {"requests": 3, "credits_spent": 36},
    "ledger_30d": {"jobs": 3, "reserved": 0, "charged": 36, "refunded": 0},
    "difference_30d": 0,
    "limits": {"requests_per_minute": 60, "in_flight": 10, "paused": None, "refused_jobs": 0},
}
REPLAY_BODY: Final[dict[str, Any]] = {
    "selection": {"since": "2026-01-31T08:00:00Z", "until": "2026-01-31T09:30:00Z"},
    "to": ["orders"],
    "reason": "orders lost its database",
}
REPLAY_HEAD: Final[dict[str, Any]] = {
    "seq": 1,
    "id": "01a1fe20-0f6b-7d1c-9b55-5c7a51f0c8d1",
    "caller": "ops",
    "idempotency_key": "01a1fe20-0f6b-7d1c-9b55-5c7a51f0c8d1",
    "reason": "orders lost its database",
    "state": "completed",
    "selection": REPLAY_BODY["selection"],
    "destinations": ["orders"],
    "media": False,
    "force": False,
    "rate": None,
    "matched": 312,
    "handled": 312,
    "ordered": 312,
    "downloads": 0,
    "error": None,
    "created_at": _AT,
    "finished_at": _AT,
}
ACTION: Final[dict[str, Any]] = {
    "id": 42,
    "at": _AT,
    "by": "alice on the command line",
    "operation": "cancel_job",
    "target": _JOB_ID,
    "reason": "ordered twice",
    "dry_run": False,
    "status": 200,
    "code": None,
}
ALERT: Final[dict[str, Any]] = {
    "alert": "dead_letters",
    "subject": "orders",
    "state": "open",
    "text": "deliveries to orders were given up: 100",
    "command": "receiver deliveries list --destination orders --state dead",
    "runbook": "docs/runbooks/dead-letters.md",
    "count": 100,
    "first_at": _AT,
    "last_at": _AT,
    "examples": [_DELIVERY_ID],
    "id": _FILE_ID,
    "raised_at": _AT,
    "resolved_at": None,
    "told_at": _AT,
}
REPLAY: Final[dict[str, Any]] = {**REPLAY_HEAD, "deliveries": {"orders": {"delivered": 312}}}

_DESTINATION: Final = {
    "name": "orders",
    "configured": True,
    "pending": 312,
    "failing": 312,
    "oldest_seconds": 540.5,
    "dead": 0,
    "delivered_per_minute": 0.0,
    "failed_per_minute": 4.0,
    "last_error": "connection refused",
    "pause": None,
    "circuit": {"since": _AT, "processes": ["web-1:41"], "error": "connection refused"},
}
DESTINATION: Final[dict[str, Any]] = {
    **_DESTINATION,
    "kind": "amqp",
    "when": "media_stored",
    "gets": "status OK",
    "command": "receiver destinations test orders",
}
PAUSED_DESTINATION: Final[dict[str, Any]] = {
    **DESTINATION,
    "pause": {"at": _AT, "by": "ops", "reason": "orders moves its database"},
    "command": "receiver destinations resume orders",
}
DESTINATION_TEST: Final[dict[str, Any]] = {
    "name": "orders",
    "reachable": True,
    "seconds": 0.042,
    "error": None,
    "warnings": [],
    "event_id": _DELIVERY_ID,
}

FREEZE: Final[dict[str, Any]] = {
    "frozen": True,
    "by": "ops",
    "reason": "the database was restored",
    "restored": True,
    "frozen_at": _AT,
}
WORKER: Final[dict[str, Any]] = {
    "host": "web-1",
    "pid": 41,
    "lanes": ["fanout", "media", "destination:orders"],
    "running": True,
    "seen_seconds_ago": 2.1,
    "live": True,
}
STATUS: Final[dict[str, Any]] = {
    "at": _AT,
    "database": "postgresql",
    "problems": [
        {
            "text": "orders is down since 12:00:00Z, 312 pending: connection refused",
            "command": "receiver destinations test orders",
        }
    ],
    "last_webhook_at": _AT,
    "events_last_hour": [0] * 57 + [4, 12, 9],
    "delivered_last_hour": [0] * 57 + [4, 0, 0],
    "failed_last_hour": [0] * 57 + [0, 12, 9],
    "rejections_last_hour": {"newline_added": 2},
    "jobs_last_day": {"completed": 1204, "submitted": 3},
    "submissions_paused": False,
    "lanes": [{"lane": "fanout", "rows": 0, "oldest_seconds": 0.0}],
    "failing_files": None,
    "retention": {"older_than_days": 90, "next_at": _AT},
    "last_retention": None,
    "retention_fails": False,
    "destinations": [_DESTINATION],
    "workers": [WORKER],
    "disks": [
        {"holds": "media", "path": "/srv/media", "free_bytes": 42949672960, "total_bytes": 107374182400}
    ],
}
EXPLANATION: Final[dict[str, Any]] = {
    "key": _REQUEST_ID,
    "state": "delivery_failing",
    "outcome": "waiting",
    "verdict": "paid 40 credits, video stored; orders has failed since 12:00: queue full; 312 others wait "
    "for the same reason; next attempt at 12:04",
    "facts": [{"at": _AT, "text": "orders: attempt 3 retry: PublishFailed: queue full"}],
    "commands": [f"receiver deliveries show {_DELIVERY_ID}"],
    "event_id": _EVENT_ID,
    "request_id": _REQUEST_ID,
    "job_id": _JOB_ID,
    "delivery_id": None,
}
