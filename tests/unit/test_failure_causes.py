"""The cause of a failure is the same for all deliveries that fail alike."""

import pytest

from receiver.core.failure_causes import MAX_CAUSE_CHARACTERS, cause_of


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("PublishRejected: https://orders.example answered 422", "answered 422"),
        (
            "PublishFailed: http://a:9: ConnectError: connection refused: does a server listen there?",
            "connection refused",
        ),
        ("PublishFailed: amqp://mq.example:5672 did not answer in time", "did not answer in time"),
        ("ValueError, see the log", "ValueError, see the log"),
        ("destination not configured", "destination not configured"),
        (
            "PublishFailed: nats://a: no stream 'orders-7' takes 01a1fe1f-4d6d-74d7-af73-a0b5ac94520e",
            "no stream … takes …",
        ),
        ("PublishFailed: the message has 1048577 bytes", "the message has … bytes"),
        (None, "unknown"),
    ],
)
def test_causes(error: str | None, cause: str) -> None:
    """Class, address, ids, long numbers and quoted text are left out; a status stays."""
    assert cause_of(error) == cause


def test_a_cause_is_short() -> None:
    """A long error has a short cause."""
    assert len(cause_of("PublishFailed: " + "many words " * 100)) <= MAX_CAUSE_CHARACTERS
