"""Addresses to listen at, as people write them. Pure: nothing is resolved or bound."""

from __future__ import annotations

import ipaddress

ACCEPTED = "accepted: ip:port, such as 127.0.0.1:8080, or [::1]:8080 for IPv6"

MAX_PORT = 65_535


def parse_address(text: str, *, lowest_port: int = 0) -> tuple[str, int]:
    """Host, without brackets, and port of `ip:port`, `name:port` or `[ipv6]:port`.

    Args:
        text: What was written.
        lowest_port: 0 where the system may pick one.

    Raises:
        ValueError: Saying what is wrong and what is accepted.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port or text.endswith("]"):
        raise ValueError(f"`{text}` has no port; {ACCEPTED}")
    if not host or host == "[]":
        raise ValueError(f"`{text}` has no address before the port; {ACCEPTED}")
    if bracketed:
        host = host[1:-1]
        if not _is_ipv6(host):
            raise ValueError(f"`{text}` has no IPv6 address in its brackets; {ACCEPTED}")
    elif ":" in host:
        raise ValueError(f"`{text}` has an IPv6 address without brackets or two ports; {ACCEPTED}")
    elif not set(host).isdisjoint("[]/@ \t") or not host.isascii():
        raise ValueError(f"`{text}` is no address with a port; {ACCEPTED}")
    return host, parse_port(port, lowest=lowest_port)


def parse_port(text: str, *, lowest: int = 1) -> int:
    """A port.

    Raises:
        ValueError: It is none, or below `lowest`.
    """
    # Five digits hold every port; without the bound int() has one of its own, with a sentence of its own.
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and lowest <= int(text) <= MAX_PORT):
        raise ValueError(f"`{text}` is no port; accepted: {lowest} to {MAX_PORT}")
    return int(text)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.IPv6Address(text).scope_id is None
    except ValueError:
        return False
