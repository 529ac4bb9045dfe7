"""Brokers that repeat what they were sent, and brokers that refuse a login: no message shows a secret."""

import asyncio

import pytest
from pydantic import SecretStr
from support.echoing import PASSWORD, PEERS, TOKEN, assert_hidden, listening, s3_repeats

from receiver.destination_settings import DestinationSettings
from receiver.destinations import Destination, open_destination
from receiver.errors import PublishFailed, StorageUnavailable
from receiver.media import open_storage


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of the kinds that read them from the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)


@pytest.mark.parametrize("peer", PEERS)
async def test_what_a_peer_repeats_is_masked(peer: str) -> None:
    """G8: a broker that refuses, repeats what it was sent, babbles or hangs up brings no secret to light."""
    url, talk = PEERS[peer]
    async with listening(talk) as port:
        destination = open_destination(
            DestinationSettings(name="test", url=SecretStr(url.format(password=PASSWORD, port=port)))
        )
        text = await failure(destination)
    assert_hidden(text)
    assert "127.0.0.1" in text


async def failure(destination: Destination) -> str:
    """Return what the check says."""
    try:
        with pytest.raises(PublishFailed) as caught:
            async with asyncio.timeout(60):
                await destination.check()
    finally:
        await destination.close()
    return str(caught.value)


async def test_what_s3_repeats_stays_behind() -> None:
    """G8: S3 repeats what was signed, session token and all; of its words only status and code are told."""
    async with listening(s3_repeats) as port:
        storage = open_storage(f"s3://bucket?endpoint=http://127.0.0.1:{port}&region=x")
        with pytest.raises(StorageUnavailable) as caught:
            await storage.check()
    assert_hidden(str(caught.value))
    assert "access denied (PermissionDeniedError, HTTP 403, SignatureDoesNotMatch)" in str(caught.value)
