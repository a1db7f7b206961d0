"""Which clients may call an operators' HTTP surface: programs, not web pages that an operator looks at.

A page can make his browser send requests here, as a form or a script (`Origin`, `Sec-Fetch-Site`), and can
read the answers if its own name resolves to this machine (DNS rebinding): then `Host` is that name.

Rules:
    1. Pure; a caller is known by its headers and the address it reached.
    2. Where only this machine can call, `Host` is an address or a name of loopback. A port for all addresses
       is reached there by others' names for it too, so only a name on loopback is refused: a page's name can
       lead there, an address in `Host` means that the page was loaded from that address.
    3. A request with an `Origin` comes from a page. None is served here, so it is foreign unless it is this
       very surface by address.
    4. No `Host` is fine: only HTTP/1.0 leaves it out, and no browser does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from metadata_center.addresses import Address, ip_or_none, is_loopback, is_unspecified

_SAME = ("same-origin", "none")
"""Of `Sec-Fetch-Site` (Fetch Metadata, W3C): of no page, or of our own."""


def refusal(
    hosts: Sequence[str],
    origins: Sequence[str],
    fetch_site: str | None,
    *,
    reached: str,
    only_loopback: bool,
    names: Collection[str] = (),
) -> str | None:
    """Why a request is not answered, or None if it is.

    Args:
        hosts: All values of `Host`.
        origins: All values of `Origin`.
        fetch_site: `Sec-Fetch-Site`, or None.
        reached: The IP address of ours that the connection came to.
        only_loopback: The surface listens on loopback alone.
        names: Names, lower case, that the operator listens by.
    """
    if len(hosts) > 1:
        return "more than one Host"
    if hosts and is_loopback(reached):
        host = host_of(hosts[0])
        known = host == "localhost" or host in names or is_loopback(host)
        if not known and (only_loopback or not _is_ip(host)):
            return "Host is no name of this machine's loopback address"
    if fetch_site is not None and fetch_site.strip().lower() not in _SAME:
        return "sent by a web page of another site"
    if any(not _is_own(origin, hosts[0] if hosts else "") for origin in origins):
        return "sent by a web page of another origin"
    return None


def host_of(authority: str) -> str:
    """The host of `host:port`, lower case, an IPv6 address without its brackets; "" if it is no such text."""
    try:
        return Address.parse(authority.strip().lower(), default_port=0).host
    except ValueError:
        return ""


def _is_ip(host: str) -> bool:
    return ip_or_none(host) is not None and not is_unspecified(host)  # 0.0.0.0 is loopback to a browser


def _is_own(origin: str, host: str) -> bool:
    host = host.strip().lower()
    if origin.strip().lower() not in (f"http://{host}", f"https://{host}"):
        return False
    name = host_of(host)
    return name == "localhost" or _is_ip(name)  # any other name may be a page's own
