"""Examples of rejected requests in the API's specification."""

from typing import Any, Final

from receiver.core.remedies import REMEDIES

REJECTION_HEAD: Final[dict[str, Any]] = {
    "id": 17,
    "received_at": "2026-11-20T10:00:00Z",
    "source": "clipia",
    "reason": "mismatch",
    "cause": "newline_added",
    "diagnosis": "A newline was appended to the body on its way: Clipia signed other bytes (secret "
    "1f0c8d19). Let the proxy in front pass the body on unchanged.",
    "path": "/clipia/webhook",
    "peer": "192.0.2.7",
    "body_size": 154,
}
REJECTION: Final[dict[str, Any]] = {
    **REJECTION_HEAD,
    "headers": [["content-type", "application/json"], ["x-clipia-signature", f"t=1769860800,v1={'5' * 64}"]],
    "body": '{"request_id": "c7b6521b-55d1-46c4-8952-f1af51482c78", …',
    "remedy": REMEDIES["newline_added"],
}
REJECTION_GROUP: Final[dict[str, Any]] = {
    "source": "clipia",
    "cause": "newline_added",
    "count": 12,
    "first": "2026-11-20T10:00:00Z",
    "last": "2026-11-20T10:00:00Z",
    "example": 17,
    "diagnosis": REJECTION_HEAD["diagnosis"],
    "remedy": REMEDIES["newline_added"],
}
