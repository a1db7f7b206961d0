"""Which endpoints a proxy leaves to be chosen from.

Rules:
    1. An entry `ip:port` names one endpoint, an entry `ip` all on that host. Anything else names none.
    2. No entry at all leaves no endpoint: that a proxy said nothing is `None`, not an empty subset.

Source: Gateway API inference extension, docs/proposals/004-endpoint-picker-protocol, and how its reference
picker reads the hint.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
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

    __slots__ = ("_named",)

    def __init__(self, entries: Iterable[str]) -> None:
        # IPv4 has one spelling, in which addresses are written here too. To read each would take 7 us, times
        # the size of the pool, of every request.
        self._named = frozenset(
            entry if entry.count(":") < 2 else _spelled(entry)
            for entry in map(str.strip, islice(entries, MAX_ENTRIES))
        )

    def has(self, address: str) -> bool:
        """True if it leaves the endpoint at `address` (`ip:port`, IPv6 in brackets)."""
        return address in self._named or address.rpartition(":")[0].strip("[]") in self._named


@lru_cache(maxsize=2 * MAX_ENTRIES)
def _spelled(entry: str) -> str:
    """An IPv6 address, with a port or without, as it is written here; empty if it is none."""
    host = ip_or_none(entry[1:-1] if entry[:1] == "[" and entry[-1:] == "]" else entry)
    if host is not None:
        return host
    try:
        return str(Address.parse(entry, lowest_port=1))
    except ValueError:
        return ""
