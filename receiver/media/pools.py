"""Connection pools for downloads: direct over the guarded network, or through a proxy."""

import ssl

import httpcore
import httpx

from receiver.errors import SettingsError


def open_tls(ca: str | None) -> ssl.SSLContext:
    """Return a context that trusts certifi's authorities and those in the file `ca`. Raises SettingsError."""
    context = httpx.create_ssl_context(trust_env=False)
    if ca is not None:
        try:
            context.load_verify_locations(cafile=ca)
        except (OSError, ValueError) as error:
            raise SettingsError(
                "RECEIVER_MEDIA_CA: cannot read a certificate from this file "
                f"({type(error).__name__}): write the path of a PEM file"
            ) from error
    return context


def open_pool(network: httpcore.AsyncNetworkBackend, tls: ssl.SSLContext) -> httpcore.AsyncConnectionPool:
    """Return a pool that connects through `network`, which checks the addresses."""
    return httpcore.AsyncConnectionPool(
        ssl_context=tls,
        network_backend=network,
        max_connections=None,  # the callers of `save` limit how many downloads run at once
        max_keepalive_connections=0,  # each file gets a connection of its own, newly vetted
    )


def open_proxied_pool(proxy: str, tls: ssl.SSLContext) -> httpcore.AsyncConnectionPool:
    """Return a pool that asks `proxy` for a tunnel to each host. The proxy resolves the host's name."""
    parsed = httpx.Proxy(proxy)
    url = parsed.url
    return httpcore.AsyncHTTPProxy(
        httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        proxy_auth=parsed.raw_auth,
        ssl_context=tls,
        proxy_ssl_context=tls if url.scheme == "https" else None,
        max_connections=None,
        max_keepalive_connections=0,
    )
