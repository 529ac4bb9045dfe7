"""The NATS client, extended."""

from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from receiver.destinations.client_internals import abort_nats_transport
from receiver.destinations.nkeys import Identity


class NatsClient(Client):
    """The library's client, but it can also be cut off, and require TLS before it sends a login."""

    def __init__(self, *, requires_tls: bool) -> None:
        super().__init__()
        self._requires_tls = requires_tls

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:  # noqa: FBT001, FBT002 - the library's signature
        # Even with `tls:` the library would send the login in plain text if the server does not offer TLS.
        if initial_connection and self._requires_tls:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.SecureConnRequiredError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    def identify(self, identity: Identity | None) -> None:
        """Announce the public key that signs; the library announces only keys that it reads itself."""
        self._public_nkey = None if identity is None else identity.public_key

    def abort(self) -> None:
        """Drop messages that have not been sent yet: `close` would wait for a server that does not read."""
        self._pending.clear()
        self._pending_data_size = 0
        if isinstance(self._transport, TcpTransport):
            abort_nats_transport(self._transport)
