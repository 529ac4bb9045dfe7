"""What to do about each cause of a rejected request; pure."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from receiver.core.diagnosis import Cause

_PROXY: Final = "Let the proxy in front pass the body and the headers on unchanged"
_FORGED: Final = "If Clipia did not send it, nothing is to be done: it was rejected, and had no effect"

REMEDIES: Final[Mapping[Cause, str]] = MappingProxyType(
    {
        "clock": "Correct the clock of this machine (NTP). RECEIVER_SIGNATURE_TOLERANCE is the difference "
        "that is allowed; do not raise it to hide a wrong clock.",
        "other_source": "Correct the callback URL, or exchange the secrets: each [[sources]] table has its "
        "own `secret`.",
        "retired_secret": "Add this secret to CLIPIA_WEBHOOK_SECRET again, next to the new one, until Clipia "
        "signs with the new one.",
        "secret_prefix": "Correct CLIPIA_WEBHOOK_SECRET (or the `secret` of the source): copy it whole.",
        "secret_spelling": "Correct CLIPIA_WEBHOOK_SECRET (or the `secret` of the source): copy it without "
        "white space and quotes.",
        "newline_added": f"{_PROXY}: it adds a line end.",
        "newline_removed": f"{_PROXY}: it removes a line end.",
        "newlines_changed": f"{_PROXY}: it rewrites line ends.",
        "json_rewritten": f"{_PROXY}: it parses the JSON and writes it anew.",
        "no_signature": f"{_PROXY}: X-Clipia-Signature must arrive. {_FORGED}.",
        "no_timestamp": f"{_PROXY}: the time `t` belongs to X-Clipia-Signature. {_FORGED}.",
        "two_signatures": f"{_PROXY}: X-Clipia-Signature must arrive once.",
        "malformed": f"{_PROXY}. {_FORGED}.",
        "empty_body": f"{_PROXY}: the body must arrive. {_FORGED}.",
        "large_body": "Compare CLIPIA_WEBHOOK_SECRET with the secret at Clipia: only small bodies are "
        f"diagnosed further. {_FORGED}.",
        "unknown_secret": "Compare CLIPIA_WEBHOOK_SECRET with the secret at Clipia. If it was rotated, add "
        f"the earlier one to CLIPIA_RETIRED_WEBHOOK_SECRET, so that it is recognized. {_FORGED}.",
        "wrong_url": "Correct the webhook URL at Clipia, or RECEIVER_PUBLIC_URL, of which the URLs of jobs "
        "are made; a source needs a [[sources]] table of its name.",
        "encoding": f"{_PROXY}: switch its compression of requests off.",
        "too_large": "If Clipia sends such bodies, raise RECEIVER_MAX_BODY_BYTES and the proxy's limit.",
        "too_slow": f"Look for a slow proxy, or a network that loses packets. {_FORGED}.",
    }
)
"""Sentences that name the setting, by cause."""
