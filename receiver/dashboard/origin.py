"""The check that a form was sent by one of our own pages (cross-site request forgery)."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers


def is_own_page(headers: Headers) -> bool:
    """Return whether a request comes from a page of this host.

    Browsers say so in `Sec-Fetch-Site`, which no script can set; some, and over plain http all, only in
    `Origin`. A request without either is none of a page's forms.
    """
    site = headers.get("sec-fetch-site")
    return _is_same_host(headers) if site is None else site == "same-origin"


def _is_same_host(headers: Headers) -> bool:
    host = headers.get("host", "")
    try:
        origin = urlsplit(headers.get("origin", ""))
    except ValueError:
        return False
    return origin.scheme in ("http", "https") and bool(host) and origin.netloc.lower() == host.lower()
