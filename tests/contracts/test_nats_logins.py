"""NATS logins by file: NKeys, and JWTs of an operator's accounts, with a real server."""

import base64
import binascii
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.kinds_base import make_event, open_url
from support.servers_redis_nats import Nats

from receiver.errors import PublishFailed, SettingsError
from receiver.masking import mask

pytestmark = pytest.mark.usefixtures("no_stray_failures")

PLACE = "subject=events&stream=EVENTS"
SEED, OPERATOR, ACCOUNT, USER = (number << 3 for number in (18, 14, 0, 20))


def encode(raw: bytes) -> str:
    """Return a key as NATS writes it."""
    return base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).decode().rstrip("=")


class Key:
    """A new key of an operator, an account or a user."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        raw = os.urandom(32)
        self.private = Ed25519PrivateKey.from_private_bytes(raw)
        self.seed = encode(bytes([SEED | kind >> 5, (kind & 31) << 3]) + raw)
        self.public = encode(bytes([kind]) + self.private.public_key().public_bytes_raw())

    def issue(self, subject: "Key", kind: str, **content: Any) -> str:
        """Return a JWT about another key, signed with this one."""
        claims = {
            "iat": 1_700_000_000,
            "iss": self.public,
            "sub": subject.public,
            "name": kind,
            "nats": {"type": kind, "version": 2, **content},
        }
        claims["jti"] = base64.b32encode(sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
        head = {"typ": "JWT", "alg": "ed25519-nkey"}
        parts = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in (head, claims)]
        signed = b".".join(part.rstrip(b"=") for part in parts)
        signature = base64.urlsafe_b64encode(self.private.sign(signed)).rstrip(b"=")
        return (signed + b"." + signature).decode()


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A server that trusts an operator's accounts."""

    server: Nats
    account: Key

    def write_credentials(self, path: Path) -> Path:
        """Make a user and write its file, as `nsc generate creds` does."""
        user = Key(USER)
        limits = {"subs": -1, "data": -1, "payload": -1}
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{self.account.issue(user, 'user', **limits)}\n"
            "------END NATS USER JWT------\n\n************************* IMPORTANT ***********************\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
        return path


@pytest.fixture(scope="module")
def operator() -> Iterator[Operator]:
    """A server with JetStream for one account."""
    operator, system, account = Key(OPERATOR), Key(ACCOUNT), Key(ACCOUNT)
    limits = {"subs": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1, "data": -1, "payload": -1}
    stored = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "wildcards": True}
    config = (
        f"operator: {operator.issue(operator, 'operator')}\n"
        f"system_account: {system.public}\nresolver: MEMORY\nresolver_preload: {{\n"
        f"  {system.public}: {operator.issue(system, 'account', limits=limits)}\n"
        f"  {account.public}: {operator.issue(account, 'account', limits=limits | stored)}\n}}\n"
    )
    with Nats(config) as server:
        yield Operator(server=server, account=account)


async def outcome(url: str) -> str:
    """Publish an event and return "delivered" or the text of the failure."""
    destination = open_url(url)
    try:
        await destination.publish(make_event())
    except PublishFailed as failure:
        return f"{failure.reason}: {failure}"
    finally:
        await destination.close()
    return "delivered"


async def test_credentials(operator: Operator, tmp_path: Path) -> None:
    """E14: a `.creds` file logs in, a user of another account does not, and no secret is shown."""
    path = operator.write_credentials(tmp_path / "user.creds")
    assert await outcome(operator.server.url(f"{PLACE}&creds={path}")) == "delivered"
    content = path.read_text().split()
    assert await outcome(operator.server.url(PLACE)) != "delivered"
    other = Operator(server=operator.server, account=Key(ACCOUNT))
    failure = await outcome(operator.server.url(f"{PLACE}&creds={other.write_credentials(path)}"))
    assert failure.startswith("auth: ")
    assert "rejects the creds file of the URL" in failure
    for secret in (word for word in content if word.startswith(("SU", "eyJ"))):
        assert secret not in mask(f"the server says {secret}")


async def test_credentials_that_are_replaced(operator: Operator, tmp_path: Path) -> None:
    """E14: each connection reads the file again; if it is missing for a moment the attempt fails."""
    path = tmp_path / "user.creds"
    destination = open_url(operator.server.url(f"{PLACE}&creds={path}"))
    await destination.start()
    with pytest.raises(PublishFailed, match="creds file of the URL cannot be read: No such file"):
        await destination.publish(make_event())
    operator.write_credentials(path)
    await destination.publish(make_event())
    await destination.close()


async def test_nkey(tmp_path: Path) -> None:
    """E14: a file with a user's seed logs in; another user's does not."""
    user, path = Key(USER), tmp_path / "user.nk"
    with Nats(f"authorization: {{ users: [ {{ nkey: {user.public} }} ] }}") as server:
        path.write_text(f"{user.seed}\n")
        assert await outcome(server.url(f"{PLACE}&nkey={path}")) == "delivered"
        path.write_text(Key(USER).seed)
        assert "rejects the nkey file of the URL" in await outcome(server.url(f"{PLACE}&nkey={path}"))


@pytest.mark.parametrize("name", ["creds", "nkey"])
async def test_files_of_something_else(tmp_path: Path, name: str) -> None:
    """G8: a file without a login, or with a typing error, is reported without its content and path."""
    path, seed = tmp_path / "s3cr3t", Key(USER).seed
    for content in ("", "eyJx.y.z", seed[:-1] + ("A" if seed[-1] != "A" else "Q"), Key(ACCOUNT).seed):
        path.write_text(content)
        failure = await outcome(f"nats://127.0.0.1:1?{PLACE}&{name}={path}")
        assert failure.startswith(
            f"auth: nats://127.0.0.1:1: the {name} file of the URL does not hold a user's"
        )
        assert "s3cr3t" not in failure


@pytest.mark.parametrize("query", ["creds=a&nkey=b", "creds=", "nkey="])
async def test_one_login_at_most(query: str) -> None:
    """G8: two logins, or an empty file name, are a mistake in the URL."""
    with pytest.raises(SettingsError, match="with creds=file or nkey=file in place of user and password"):
        open_url(f"nats://127.0.0.1?{PLACE}&{query}")
    with pytest.raises(SettingsError):
        open_url(f"nats://user:password@127.0.0.1?{PLACE}&creds=a")
