"""Prompt blocks of requests in flight, per endpoint: what an engine has cached or is about to cache.

Rules:
    1. An engine never evicts the blocks of a request that runs there, and computes those of one that waits
       there before any request behind it starts. So from a request's charge to its end its blocks are a
       hit for whoever comes after it, whatever else is known of that cache.
    2. Blocks come as chains (see `prefix_index`) and are added and removed whole, so a count never exceeds
       that of its ancestor: `match` bisects.
    3. Counts are exact: what was not added (Rule 4) must not be removed, which `add` tells.
    4. Memory is bounded by `max_blocks` over all endpoints.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from metadata_center.types import EndpointKey


class RunningBlocks:
    """Counts of blocks in use.

    Args:
        max_blocks: Bound on blocks counted, summed over endpoints; chains beyond it are left out.
    """

    def __init__(self, max_blocks: int = 2_000_000) -> None:
        self._counts: dict[EndpointKey, dict[int, int]] = {}
        self._max_blocks = max_blocks
        self._blocks = 0

    def __len__(self) -> int:
        """Distinct blocks in use, summed over endpoints."""
        return self._blocks

    def add(self, endpoint: EndpointKey, blocks: Sequence[int]) -> bool:
        """One more request with these blocks is on its way; False if there are none, or no room for them."""
        if not blocks or self._blocks + len(blocks) > self._max_blocks:
            return False
        counts = self._counts.get(endpoint)
        if counts is None:
            counts = self._counts[endpoint] = {}
        before = len(counts)
        for block in blocks:
            counts[block] = counts.get(block, 0) + 1
        self._blocks += len(counts) - before
        return True

    def remove(self, endpoint: EndpointKey, blocks: Sequence[int]) -> None:
        """A request that was added is over."""
        counts = self._counts[endpoint]
        before = len(counts)
        for block in blocks:
            left = counts[block] - 1
            if left:
                counts[block] = left
            else:
                del counts[block]
        self._blocks += len(counts) - before
        if not counts:
            del self._counts[endpoint]

    def match(self, blocks: Sequence[int], rows: Mapping[EndpointKey, int]) -> Iterator[tuple[int, int]]:
        """Row and number of leading blocks, for each endpoint that has at least the first one in use.

        Args:
            blocks: The prompt's chain, head first.
            rows: Endpoints that matter, and their rows.
        """
        if not blocks:
            return
        first = blocks[0]
        for endpoint, counts in self._counts.items():
            if first in counts:
                row = rows.get(endpoint)
                if row is not None:
                    yield row, bisect_left(blocks, True, 1, key=lambda block: block not in counts)
