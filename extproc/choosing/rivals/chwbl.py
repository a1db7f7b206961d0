"""Consistent hashing with bounded loads: the conversation's place on a ring, or the next one with room.

Source: Mirrokni et al., arXiv 1608.01350, as in KubeAI `internal/loadbalancer/balance_chwbl.go` (256 places
per endpoint, load factor 1.25, the prompt's first 100 characters where there is no better key).

An endpoint has room if its requests + 1 <= factor · (all requests + 1)/endpoints. The key is the session if
the request names one, else the blocks that hold the first `prefix_tokens`. It never looks at the cache.
"""

from __future__ import annotations

from bisect import bisect_left
from math import ceil
from typing import Final

import xxhash

from extproc.choosing.stateful import FleetView, StatefulPolicy

_PLACES: Final = 256


class Chwbl(StatefulPolicy):
    """First endpoint clockwise of the key that has room.

    Args:
        factor: How far above the mean an endpoint may be loaded, > 1; source default.
        prefix_tokens: Head of the prompt that makes the key of a request without a session, >= 1; 100
            characters in the source.
    """

    __slots__ = ("_factor", "_places", "_prefix_tokens", "_rows")

    def __init__(self, *, factor: float = 1.25, prefix_tokens: int = 25) -> None:
        self._factor = factor
        self._prefix_tokens = prefix_tokens
        self._places: list[int] = []
        self._rows: list[int] = []

    def choose(self, view: FleetView) -> int:
        """No draw."""
        if not self._places:
            ring = sorted(
                (_hash(f"{key}{place}"), row) for row, key in enumerate(view.keys) for place in range(_PLACES)
            )
            self._places = [place for place, _ in ring]
            self._rows = [row for _, row in ring]
        request = view.request
        name = request.session
        if name is None:
            head = request.blocks[: ceil(self._prefix_tokens / view.block_size)]
            name = str(head[-1] if head else request.request_id)
        start = bisect_left(self._places, _hash(name))
        room = self._factor * (sum(view.requests) + 1) / len(view.keys)
        for step in range(len(self._rows)):
            row = self._rows[(start + step) % len(self._rows)]
            if view.requests[row] + 1 <= room:
                return row
        return self._rows[start % len(self._rows)]


def _hash(name: str) -> int:
    return xxhash.xxh64_intdigest(name.encode())
