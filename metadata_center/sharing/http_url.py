"""URLs of metadata centers that speak HTTP."""

from __future__ import annotations

from urllib.parse import urlsplit

from metadata_center.sharing.transport import TransportError


def checked_http_url(url: str) -> str:
    """The URL without slashes at its end.

    Raises:
        TransportError: It is none of a server, or holds more than where that is; the text does not quote it.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        good = False
    if not good or "@" in parts.netloc or parts.query or parts.fragment:
        raise TransportError("the metadata center's URL should be http://host:port or https://host:port")
    return url.rstrip("/")
