"""Where something is reached: a host and a port, read and written in one way. Pure: nothing is resolved.

Rules:
    1. `ip:port` and `name:port`, an IPv6 address in brackets; nothing else in the repository takes such text
       apart or puts it together.
    2. IP addresses have one spelling (RFC 5952 for IPv6), so equal addresses are equal values. IPv4 in IPv6
       (`::ffff:10.0.0.1`) is the IPv4 address: Envoy connects to no other spelling of it. A zone belongs to
       one machine and means nothing to others: an address with one is none.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple

ACCEPTED: Final = "accepted: ip:port, such as 127.0.0.1:8080, or [::1]:8080 for IPv6"

MAX_PORT: Final = 65_535

_OCTET: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4: Final = re.compile(rf"{_OCTET}(?:\.{_OCTET}){{3}}")
"""Of an IPv4 address there is one spelling: what it is in needs no parser, which takes ten times as long."""

_MAX_HOST_CHARS: Final = 253
"""RFC 1035 section 2.3.4, without the trailing dot."""


class Address(NamedTuple):
    """A host and a port. A tuple, because the access log makes and looks up one for every request.

    Attributes:
        host: An IP address, IPv6 without brackets, or a name.
        port: 0..65535; 0 where the system may pick one.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"{in_brackets(self.host)}:{self.port}"

    @classmethod
    def of(cls, host: str, port: int) -> Address:
        """The address with the one spelling of its host."""
        return cls(_canonical(host) if ":" in host else host, port)

    @classmethod
    def parse(cls, text: str, *, lowest_port: int = 0, default_port: int | None = None) -> Address:
        """The address in `ip:port`, `name:port` or `[ipv6]:port`.

        Args:
            text: What was written.
            lowest_port: 0 where the system may pick one.
            default_port: Of an address without one; None refuses it.

        Raises:
            ValueError: Saying what is wrong and what is accepted.
        """
        host, colon, port = text.rpartition(":")
        if text.endswith("]") or not colon:
            host, port = text, ""
        if not port and (default_port is None or (colon and host != text)):
            raise ValueError(f"`{text}` has no port; {ACCEPTED}")
        if not host or host == "[]":
            raise ValueError(f"`{text}` has no address before the port; {ACCEPTED}")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            canonical = ip_or_none(host)
            if canonical is None or ":" not in host:
                raise ValueError(f"`{text}` has no IPv6 address in its brackets; {ACCEPTED}")
            host = canonical
        elif ":" in host:
            raise ValueError(f"`{text}` has an IPv6 address without brackets or two ports; {ACCEPTED}")
        elif (
            not set(host).isdisjoint("[]/@ \t")
            or not (host.isascii() and host.isprintable())
            or len(host) > _MAX_HOST_CHARS
        ):
            raise ValueError(f"`{text}` is no address with a port; {ACCEPTED}")
        return cls(host, parse_port(port, lowest=lowest_port) if port else default_port or 0)


def parse_port(text: str, *, lowest: int = 1) -> int:
    """A port.

    Raises:
        ValueError: It is none, or below `lowest`.
    """
    # Five digits hold every port; without the bound int() has one of its own, with a sentence of its own.
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and lowest <= int(text) <= MAX_PORT):
        raise ValueError(f"`{text}` is no port; accepted: {lowest} to {MAX_PORT}")
    return int(text)


def ip_or_none(text: str) -> str | None:
    """The one spelling of an IP address without brackets and zone; None if it is none."""
    if _IPV4.fullmatch(text):
        return text
    try:
        ip = ip_address(text)
    except ValueError:
        return None
    if isinstance(ip, IPv6Address):
        if ip.scope_id is not None:
            return None
        ip = ip.ipv4_mapped or ip
    return ip.compressed


def in_brackets(host: str) -> str:
    """The host as URLs and `Host` have it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """True for an IP address of loopback, be it IPv4 in IPv6."""
    try:
        ip = ip_address(host)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).is_loopback


def is_unspecified(host: str) -> bool:
    """True for the IP addresses that stand for all of a machine's own: `0.0.0.0` and `::`."""
    return ip_or_none(host) in ("0.0.0.0", "::")  # noqa: S104 - recognised, not bound


def is_of_many(host: str) -> bool:
    """True for an IP address of several machines, multicast or broadcast: no connection leads there."""
    try:
        ip = ip_address(host)
    except ValueError:
        return False
    return ip.is_multicast or host == "255.255.255.255"


@lru_cache(maxsize=4096)
def _canonical(host: str) -> str:
    return ip_or_none(host) or host
