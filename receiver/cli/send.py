"""`receiver send`: post a payload to a receiver, signed like one of Clipia's."""

import time
import uuid
from typing import Annotated

import httpx
import typer

from receiver.cli.remote import local_only
from receiver.cli.terminal import print_line, read_file
from receiver.core.signature import sign
from receiver.error_texts import cause
from receiver.errors import ReceiverUnavailable, SettingsError
from receiver.masking import mask
from receiver.settings import CALLBACK_PATH, DEFAULT_SOURCE, Settings


@local_only("it signs with a secret of this machine; give the address of the callback with `send --url`")
def send(
    file: Annotated[str, typer.Argument(help="A file with the payload; - for standard input.")],
    url: Annotated[
        str, typer.Option(help="The receiver's callback.")
    ] = f"http://127.0.0.1:8000{CALLBACK_PATH}",
    source: Annotated[str, typer.Option(help="Sign with the secret of this source.")] = DEFAULT_SOURCE,
    age: Annotated[int, typer.Option(help="Date the signature this many seconds back.")] = 0,
) -> None:
    """Sign a payload with the source's first secret and post it to a receiver, like Clipia does.

    Prints the answer; the exit status is 0 for a 2xx.
    """
    secrets = {each.name: each.secrets[0] for each in Settings.load().require_sources()}
    if source not in secrets:
        raise SettingsError(f"there is no source {source!r}; configured: {', '.join(secrets)}")
    body = read_file(file)
    timestamp = int(time.time()) - age
    headers = {
        "Content-Type": "application/json",
        "X-Clipia-Signature": sign(secrets[source].encode(), body, timestamp=timestamp),
        "X-Clipia-Timestamp": str(timestamp),
        "X-Clipia-Webhook-Id": str(uuid.uuid4()),
    }
    try:
        response = httpx.post(url, content=body, headers=headers, timeout=10, trust_env=False)
    except httpx.HTTPError as error:
        raise ReceiverUnavailable(
            f"{mask(url)} did not answer: {cause(error)}; is `receiver serve` running?", reason="unreachable"
        ) from None
    print_line(f"{response.status_code} {response.text}")
    if not response.is_success:
        raise typer.Exit(1)
