"""Which endpoints a proxy leaves to be chosen from.

Rules:
    1. An entry `ip:port` names one endpoint, an entry `ip` all on that host. Anything else names none.
    2. No entry at all leaves no endpoint: that a proxy said nothing is `None`, not an empty subset.

Source: Gateway API inference extension, docs/proposals/004-endpoint-picker-protocol, and how its reference
picker reads the hint.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from metadata_center.addresses import Address, ip_or_none

MAX_ENTRIES: Final = 4_096
"""More than a pool has endpoints; the rest is not looked at."""


class Subset:
    """Endpoints by address.

    Args:
        entries: As the proxy wrote them.
    """

    __slots__ = ("_addresses", "_hosts")

    def __init__(self, entries: Iterable[str]) -> None:
        hosts: set[str] = set()
        addresses: set[str] = set()
        for entry in islice(entries, MAX_ENTRIES):
            text = entry.strip()
            host = ip_or_none(text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text)
            if host is not None:
                hosts.add(host)
                continue
            try:
                addresses.add(str(Address.parse(text, lowest_port=1)))
            except ValueError:
                continue
        self._hosts = frozenset(hosts)
        self._addresses = frozenset(addresses)

    def has(self, address: str) -> bool:
        """True if it leaves the endpoint at `address` (`ip:port`, IPv6 in brackets)."""
        if address in self._addresses:
            return True
        return bool(self._hosts) and address.rpartition(":")[0].strip("[]") in self._hosts
