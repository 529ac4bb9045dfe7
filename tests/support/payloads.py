"""Webhook bodies and signed headers like Clipia's."""

import hashlib
import hmac
import json
import time
import uuid
from typing import Any

from clipia.webhooks import _compute_signature

SECRET = "whsec_test-0123456789abcdef"


def body(request_id: str | None = None, **changes: Any) -> bytes:
    """Return the body of a successful image generation."""
    payload: dict[str, Any] = {
        "model": "nano-banana-2",
        "output": {"images": [{"url": "https://media.clipia.ai/works/a.png", "width": 8, "height": 8}]},
        "cost": 12,
    }
    value = {"request_id": request_id or str(uuid.uuid4()), "status": "OK", "payload": payload, **changes}
    return json.dumps(value).encode()


def failure(request_id: str | None = None, message: str = "The model refused the prompt.") -> bytes:
    """Return the body of a failed generation."""
    error = {"code": "GENERATION_FAILED", "message": message}
    value = {"request_id": request_id or str(uuid.uuid4()), "status": "ERROR", "error": error}
    return json.dumps(value).encode()


def signed(content: bytes, *, secret: str = SECRET, at: float | None = None) -> dict[str, str]:
    """Return the headers of a webhook, signed by the official SDK.

    With the receiver's own code, a test would not see an error that signing and verifying share.
    """
    timestamp = str(int(time.time() if at is None else at))
    try:
        digest = _compute_signature(secret, timestamp, content.decode())
    except UnicodeDecodeError:  # the SDK signs text only
        digest = hmac.new(secret.encode(), timestamp.encode() + b"." + content, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json",
        "X-Clipia-Signature": f"t={timestamp},v1={digest}",
        "X-Clipia-Timestamp": timestamp,
        "X-Clipia-Webhook-Id": str(uuid.uuid4()),
    }
