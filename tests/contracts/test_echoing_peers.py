"""Brokers that repeat the bytes they get, and brokers that reject a login: no message shows a secret."""

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
    """Credentials for the kinds that read them from the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)


@pytest.mark.parametrize("peer", PEERS)
async def test_repeated_secrets_are_masked(peer: str) -> None:
    """G8: if a broker rejects a login, repeats it, answers garbage or hangs up, no secret is shown."""
    url, talk = PEERS[peer]
    async with listening(talk) as port:
        destination = open_destination(
            DestinationSettings(name="test", url=SecretStr(url.format(password=PASSWORD, port=port)))
        )
        text = await failure(destination)
    assert_hidden(text)
    assert "127.0.0.1" in text


async def failure(destination: Destination) -> str:
    """Return the text of the check's failure."""
    try:
        with pytest.raises(PublishFailed) as caught:
            async with asyncio.timeout(60):
                await destination.check()
    finally:
        await destination.close()
    return str(caught.value)


async def test_text_of_s3_is_left_out() -> None:
    """G8: S3 repeats the signed headers with the session token; only its status and code are shown."""
    async with listening(s3_repeats) as port:
        storage = open_storage(f"s3://bucket?endpoint=http://127.0.0.1:{port}&region=x")
        with pytest.raises(StorageUnavailable) as caught:
            await storage.check()
    assert_hidden(str(caught.value))
    assert "access denied (PermissionDeniedError, HTTP 403, SignatureDoesNotMatch)" in str(caught.value)
